"""A model's weights on their way to an engine: tensor by tensor, whole, by HF name, on the GPU or the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from bridge.client import RemoteEngine
from bridge.errors import EngineError
from kdjax.models import hf_tensors


class EngineTensors:
    """Iterates ``(name, array)`` of every tensor of ``model`` as its checkpoint would hold it, in ``dtype``.

    For an engine on GPUs of this host, the student being there too, tensors stay where they are: ``gpu`` is the number
    of the one that holds them, whole, as jax Arrays. Else ``gpu`` is None and they are NumPy arrays. A sharded
    parameter is gathered one layer at a time, so besides the engine's bucket no second copy of the model exists.
    """

    def __init__(self, model: nnx.Module, dtype: str | None = None, *, engine_device: str = "cpu") -> None:
        self._model, self._dtype = model, dtype
        home = jax.tree.leaves(nnx.state(model, nnx.Param))[0].sharding
        self._device = min(home.addressable_devices, key=lambda device: device.local_hardware_id)
        on_gpus = self._device.platform == "gpu" and engine_device == "cuda"
        self.gpu = self._device.local_hardware_id if on_gpus else None
        self._gather = _gather(home.mesh) if isinstance(home, NamedSharding) and home.num_devices > 1 else None

    def __iter__(self) -> Iterator[tuple[str, jax.Array | np.ndarray]]:
        for name, tensor in hf_tensors(self._model, self._dtype):
            yield name, np.asarray(tensor) if self.gpu is None else self.whole(tensor)

    def whole(self, x: jax.Array) -> jax.Array:
        """All of ``x`` on one device; what is sharded is gathered between devices, never by the host."""
        if self._gather is not None:
            x = self._gather(x)
        return next(piece.data for piece in x.addressable_shards if piece.device == self._device)


def send(
    engine: RemoteEngine,
    model: nnx.Module,
    *,
    version: int,
    whose: Literal["student", "teacher"],
    label: tuple[str, int],
    bucket_bytes: int,
) -> None:
    """Give ``engine`` the weights of ``model`` as of step ``version``; ``label`` is what it then ``holds``.

    Raises EngineError that says ``whose`` they are and names the tensors among which it broke off.
    """
    tensors = EngineTensors(model, engine.spec.dtype, engine_device=engine.spec.device)
    try:
        engine.update_weights(tensors, version=version, bucket_bytes=bucket_bytes, label=label, gpu=tensors.gpu)
    except EngineError as error:
        raise EngineError(f"the {whose}'s weights of step {version} did not reach its engine: {error}") from None


def student_label(version: int) -> tuple[str, int]:
    """What an engine ``holds`` that runs the student as of step ``version``."""
    return "student", version


@functools.cache
def _gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """A copy on every device of ``mesh``; one function for all syncs, so that only the first one compiles."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
