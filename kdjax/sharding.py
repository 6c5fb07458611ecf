"""Where arrays live: the device mesh, and one table from logical axis names to mesh axes.

Every parameter and activation names its dimensions (``"embed"``, ``"heads"``, ``"batch"`` …). The table says which mesh
axes split such a dimension, so a layout is changed in one place and models never mention devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P

from kdjax.errors import UserError

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
BATCH_AXES = (DATA, FSDP)


@dataclass(frozen=True)
class Rules:
    """Logical axis → mesh axes. ``data`` and ``fsdp`` split the batch; ``fsdp`` also splits parameters (ZeRO-3,
    1910.02054); ``tensor`` splits heads, the MLP and the vocabulary (Megatron, 1909.08053)."""

    batch: tuple[str, ...] = BATCH_AXES
    sequence: tuple[str, ...] = ()
    embed: tuple[str, ...] = (FSDP,)
    heads: tuple[str, ...] = (TENSOR,)
    kv_heads: tuple[str, ...] = (TENSOR,)
    head_dim: tuple[str, ...] = ()
    mlp: tuple[str, ...] = (TENSOR,)
    vocab: tuple[str, ...] = (TENSOR,)
    layers: tuple[str, ...] = ()

    def spec(
        self, axes: Sequence[str | None], shape: Sequence[int] | None = None, mesh: Mesh | AbstractMesh | None = None
    ) -> P:
        """The PartitionSpec for dimensions named ``axes`` (None: not split).

        Given ``shape`` and ``mesh``, a dimension that its mesh axes do not divide stays whole: every device then holds
        all of it (two kv heads on four tensor devices, say), which is slower but never wrong.
        """
        entries = []
        for i, name in enumerate(axes):
            over = () if name is None else getattr(self, name)
            if shape is not None and mesh is not None and shape[i] % prod(mesh.shape[a] for a in over):
                over = ()
            entries.append(None if not over else over[0] if len(over) == 1 else over)
        return P(*entries)

    def sharding(self, mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> NamedSharding:
        return NamedSharding(mesh, self.spec(axes, shape, mesh))


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A ``(data, fsdp, tensor)`` mesh with automatic partitioning; one size may be -1: whatever devices are left.

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {DATA: data, FSDP: fsdp, TENSOR: tensor}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh: only one of data, fsdp and tensor may be -1, got {', '.join(free)}")
    fixed = prod(size for size in sizes.values() if size != -1)
    if free and fixed > 0 and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if prod(sizes.values()) != len(devices):
        asked = " × ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"mesh: {asked} does not fit {len(devices)} device(s); let the product be {len(devices)}")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def data_shards(mesh: Mesh | None) -> int:
    """How many pieces the batch is split into: mesh data × fsdp (G in shapes)."""
    return 1 if mesh is None else mesh.shape[DATA] * mesh.shape[FSDP]


def constrain(x: jax.Array, *axes: str | None, rules: Rules = Rules()) -> jax.Array:
    """Pin the layout of an activation under the ambient mesh (``jax.set_mesh``); without one, return it as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, rules.spec(axes, x.shape, mesh))
