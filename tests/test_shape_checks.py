"""Are calls in the tests held to the shapes and dtypes of their annotations, and pytrees as JAX rebuilds them not?"""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from kdjax.data.batch import collate
from kdjax.head import Head
from kdjax.losses import kl
from kdjax.models.rope import rotate


@pytest.mark.parametrize(
    "call",
    [
        lambda: kl(np.zeros((2, 5), np.float32), np.zeros((2, 6), np.float32)),
        lambda: kl(np.zeros((2, 5), int), np.zeros((2, 5), np.float32)),
        lambda: rotate(jnp.zeros((1, 3, 2, 4)), jnp.zeros((1, 3, 2)), jnp.zeros((1, 2, 2))),
        lambda: Head(np.zeros((3, 5), np.float32), bias=np.zeros(5, int)),
        lambda: collate("rows", batch=1, seq_len=4),
    ],
    ids=["another vocabulary", "another dtype", "another length", "a pytree", "no rows"],
)
def test_a_call_is_held_to_its_annotations(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_a_head_may_hold_what_stands_for_arrays():
    head = Head(np.zeros((3, 5), np.float32), np.zeros(5, np.float32))
    assert jax.tree.map(lambda x: x.shape, head).weight == (3, 5)
