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
    assert stream.pool.usage().used == 0
