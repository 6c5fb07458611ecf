"""What the repository ships and claims: the teacher's size, the student's share of it, the README's table."""

import json

import pytest

from benchmarks import quickstart
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


def _leaves(model):
    import jax
    from flax import nnx

    return jax.tree.leaves(nnx.state(model, nnx.Param))


def test_readme_shows_the_measured_table(root):
    result = json.loads(quickstart.RESULT.read_text())
    assert quickstart.table(result) in (root / "README.md").read_text()


def test_distilling_beats_fine_tuning_on_every_seed():
    """The committed measurement, not a timed run: held-out cross-entropy, equal steps, equal seconds, SFT's best."""
    runs = json.loads(quickstart.RESULT.read_text())["runs"]
    for i, kd in enumerate(runs["kd"]):
        assert kd["final"]["teacher_ce"] < kd["final"]["ce"]
        for other in ("sft_steps", "sft_seconds"):
            assert kd["final"]["ce"] < runs[other][i]["final"]["ce"]
        assert kd["final"]["ce"] < runs["sft_best"][i]["best"]["ce"]
