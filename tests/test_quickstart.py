"""What the repository ships and claims: the teacher, the student's share of its size, and what distilling gains."""

import json

import pytest
from safetensors import safe_open

from benchmarks import few_rows, quickstart
from kdjax.config import load_config
from kdjax.models import load_model


@pytest.fixture(scope="module")
def configured(root):
    return load_config(root / "configs" / "quickstart.yaml")


def test_teacher_is_small_and_the_student_a_quarter_of_it(root, configured):
    teacher = root / "examples" / "teacher"
    assert (teacher / "model.safetensors").stat().st_size <= 16e6
    assert json.loads((teacher / "config.json").read_text())["eos_token_id"] == 2
    count = lambda model: sum(x.size for x in _leaves(model))  # noqa: E731
    big = load_model(teacher, abstract=True)
    small = load_model(teacher, abstract=True, config=dict(configured.student.config), init="random")
    assert count(small) <= count(big) / 4


def test_the_shipped_teacher_is_the_one_its_configuration_makes(root):
    teacher, tokenizer = root / "examples" / "teacher", root / "examples" / "tokenizer"
    with safe_open(teacher / "model.safetensors", "numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    described = load_config(root / "configs" / "quickstart_teacher.yaml").student.config
    assert described.items() <= json.loads((teacher / "config.json").read_text()).items()
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (teacher / name).read_bytes() == (tokenizer / name).read_bytes()


def test_distilling_beats_fine_tuning_with_every_seed():
    """The committed measurement: held-out cross-entropy after equal steps, equal seconds, and against SFT's best."""
    result = json.loads(quickstart.RESULT.read_text())
    runs = result["runs"]
    assert len(result["seeds"]) >= 3
    for i, kd in enumerate(runs["kd"]):
        assert kd["final"]["teacher_ce"] < kd["final"]["ce"]
        for other in ("sft_steps", "sft_seconds"):
            assert kd["final"]["ce"] < runs[other][i]["final"]["ce"]
        alone = runs["sft_long"][i]
        assert alone["best_step"] < alone["steps"] and alone["best"]["ce"] < alone["final"]["ce"]
        # The teacher is better than the student alone ever was, and its student at half the steps is as well.
        assert kd["final"]["teacher_ce"] < kd["final"]["ce"] < alone["best"]["ce"]
        assert runs["kd_long"][i]["final"]["ce"] < alone["best"]["ce"]


def test_distilling_beats_fine_tuning_at_its_own_best_step():
    """The committed measurement: SFT's best evaluation lies well before its last, and is still the worse with each."""
    result = json.loads(few_rows.RESULT.read_text())
    assert len(result["seeds"]) >= 3
    for kd, sft in zip(result["runs"]["kd_few"], result["runs"]["sft_few"], strict=True):
        assert sft["best_step"] < sft["steps"] == kd["steps"] and sft["best"]["ce"] < sft["final"]["ce"]
        assert kd["final"]["teacher_ce"] < kd["final"]["ce"] < sft["best"]["ce"]


def _leaves(model):
    import jax
    from flax import nnx

    return jax.tree.leaves(nnx.state(model, nnx.Param))
