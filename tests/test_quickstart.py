"""What the repository ships: the teacher's size and the student's share of it."""

import json

import pytest
from safetensors import safe_open

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


def _leaves(model):
    import jax
    from flax import nnx

    return jax.tree.leaves(nnx.state(model, nnx.Param))
