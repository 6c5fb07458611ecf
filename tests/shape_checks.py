"""The type checker that `--jaxtyping-packages` is given: annotations hold at every call.

`check` is beartype, for which an int is a float too.
"""

from functools import wraps

import jax
import numpy as np
from beartype import BeartypeConf, beartype

PYTREES = ("Head.__init__", "Batch.__init__")

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
    if function.__qualname__ not in PYTREES:
        return checked(function)
    strict = checked(function)

    @wraps(function)
    def where_arrays_are(self, *args, **kwargs):
        # JAX makes a dataclass that it knows anew, with shardings, shapes or None in the place of arrays.
        leaves = jax.tree.leaves((args, kwargs))
        held = any(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
        return (strict if held else function)(self, *args, **kwargs)

    return where_arrays_are
