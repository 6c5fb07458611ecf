"""A model's weights on their way to an engine: tensor by tensor, whole, by HF name, on the GPU or the host."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

from kdjax.models import hf_tensors


class EngineTensors:
    """Iterates ``(name, array)`` of every tensor of ``model`` as its checkpoint would hold it, in ``dtype``.

    For an engine on GPUs of this host, the student being there too, tensors stay where they are: ``gpu`` is the number
    of the one that holds them, whole, as jax Arrays. Else ``gpu`` is None and they are NumPy arrays. A sharded
    parameter is gathered one layer at a time, so besides the engine's bucket no second copy of the model exists.
    ``last`` is the name of the tensor that was handed out last.
    """

    def __init__(self, model: nnx.Module, dtype: str | None = None, *, engine_device: str = "cpu") -> None:
        self._model, self._dtype = model, dtype
        home = jax.tree.leaves(nnx.state(model, nnx.Param))[0].sharding
        self._device = min(home.addressable_devices, key=lambda device: device.local_hardware_id)
        on_gpus = self._device.platform == "gpu" and engine_device == "cuda"
        self.gpu = self._device.local_hardware_id if on_gpus else None
        self._gather = None
        if isinstance(home, NamedSharding) and home.num_devices > 1:
            self._gather = jax.jit(lambda x: x, out_shardings=NamedSharding(home.mesh, P()))
        self.last = "the first tensor"

    def __iter__(self) -> Iterator[tuple[str, jax.Array | np.ndarray]]:
        for name, tensor in hf_tensors(self._model, self._dtype):
            self.last = name
            yield name, np.asarray(tensor) if self.gpu is None else self.whole(tensor)

    def whole(self, x: jax.Array) -> jax.Array:
        """All of ``x`` on one device; what is sharded is gathered between devices, never by the host."""
        if self._gather is not None:
            x = self._gather(x)
        return next(piece.data for piece in x.addressable_shards if piece.device == self._device)
