"""The best weights are kept as they will be exported, and say whose they are."""

import json

import step_tools

from kdjax.config import from_dict
from kdjax.models import load_model
from kdjax.training.best import BEST, Best, read_best, write_best


def test_they_are_written_like_an_export_and_say_their_step(root, tmp_path):
    shape = step_tools.SHAPE | {"eos_token_id": 7}
    config = from_dict(
        {
            "student": {"init": "random", "config": shape, "export_dtype": "bfloat16"},
            "data": {"train": [{"path": "none.jsonl"}], "tokenizer": str(root / "examples" / "tokenizer")},
        }
    )
    model = load_model(None, config=shape, init="random", seed=1)
    assert read_best(tmp_path) is None
    for best in (Best(3, {"ce": 2.5, "kl_at/0-1": 0.25}), Best(6, {"ce": 2.0})):
        write_best(tmp_path, model, config, best)
        assert read_best(tmp_path) == best
    assert (tmp_path / BEST / "tokenizer.json").read_bytes() == (
        root / "examples/tokenizer/tokenizer.json"
    ).read_bytes()
    said = json.loads((tmp_path / BEST / "config.json").read_text())
    assert said["eos_token_id"] == 7 and said["dtype"] == "float32"  # nothing is lost before the export itself
