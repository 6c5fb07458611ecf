"""A model's weights on their way to an engine: one tensor at a time from the mesh to the host, by its HF name."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from flax import nnx

from kdjax.models import hf_tensors


class HostTensors:
    """Iterates ``(name, array)`` of every tensor of ``model`` as its checkpoint would hold it, in ``dtype``.

    A sharded parameter is gathered one layer at a time, so besides the engine's bucket one tensor is on the host.
    ``last`` is the name of the tensor that was handed out last.
    """

    def __init__(self, model: nnx.Module, dtype: str | None = None) -> None:
        self._model, self._dtype = model, dtype
        self.last = "the first tensor"

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in hf_tensors(self._model, self._dtype):
            self.last = name
            yield name, np.asarray(tensor)
