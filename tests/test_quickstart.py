"""What the repository ships: the teacher's size and the student's share of it."""

import json

import pytest

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
