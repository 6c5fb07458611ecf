"""Truth at the border: a head that is not the engine's stops the run before step 1 and says how large the gap is."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import from_dict
from kdjax.errors import UserError
from kdjax.training.preflight import check_teacher
from kdjax.training.sources import Stream

pytestmark = pytest.mark.usefixtures("devices_as_asked")


@pytest.fixture(scope="module")
def opened(request, tmp_path_factory):
    streams = []

    def make(values):
        if not streams:
            streams.append(Stream(from_dict(values), log=tmp_path_factory.mktemp("log") / "engine.log"))
        return streams[0]

    yield make
    for stream in streams:
        stream.close()


def other_heads():
    rng = np.random.default_rng(0)
    return {
        "a wrong head": lambda h: replace(h, weight=jnp.asarray(rng.normal(size=h.weight.shape), jnp.float32)),
        "a missing soft-cap": lambda h: replace(h, soft_cap=5.0),
        "a forgotten scale": lambda h: replace(h, scale=0.5),
        "a shuffled vocabulary": lambda h: replace(h, weight=h.weight[rng.permutation(len(h.weight))]),
        "a stale teacher": lambda h: replace(h, weight=h.weight * 1.01),
    }


def test_the_right_head_passes(run_values, opened):
    assert check_teacher(opened(run_values)) < 1e-4


@pytest.mark.parametrize("fault", list(other_heads()))
def test_another_head_is_refused(run_values, opened, fault):
    stream = opened(run_values)
    right = stream.teachers
    try:
        stream.teachers = (right[0]._replace(head=other_heads()[fault](right[0].head)),)
        with pytest.raises(UserError, match=r"preflight: .* differ from the engine's own by .* nats on average"):
            check_teacher(stream)
    finally:
        stream.teachers = right
    assert stream.engine.pool.usage().used == 0


def test_chat_templates_that_disagree_are_told():
    from types import SimpleNamespace

    from data_tools import family

    from kdjax.training import preflight

    ours, theirs = family("qwen2.5"), family("llama3")
    config = SimpleNamespace(
        data=SimpleNamespace(chat_template=None, template_args={}), teacher=SimpleNamespace(path="teacher")
    )
    end = ours.convert_tokens_to_ids("<|im_end|>")

    def told(teacher, stop_ids):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(preflight, "load_tokenizer", lambda path: teacher)
            return preflight.check_templates(ours, config, stop_ids)

    assert told(ours, {end}) == []
    notes = "\n".join(told(theirs, {end}))
    for words in ("<|im_end|>", "<|eot_id|>", "asks otherwise than the student's, from token 0"):
        assert words in notes
    with pytest.raises(
        UserError, match=rf"ends an assistant's turn with '<\|im_end\|>' .* rollout.stop_ids: \[{end}\]"
    ):
        told(ours, {end + 1})
    plain = family("qwen3")
    plain.chat_template, kept = None, plain.chat_template
    try:
        assert told(plain, {end}) == ["warning: the teacher has no chat template of its own; it reads the student's"]
    finally:
        plain.chat_template = kept
