"""From a Hugging Face folder or hub id to a model on the mesh, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from kdjax.errors import UserError
from kdjax.folders import resolve
from kdjax.models.checkpoint import Checkpoint, open_checkpoint, placed
from kdjax.models.config import ModelConfig
from kdjax.models.decoder import Compute, Decoder
from kdjax.models.weights import Weight, param_shardings, state_shardings, weight_table
from kdjax.sharding import Rules


def load_model(
    path: str | Path | None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    dtype: str = "float32",
    param_dtype: str | None = None,
    abstract: bool = False,
    *,
    init: str | Sequence[int] = "pretrained",
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    remat: str = "none",
    attention: str = "xla",
    unroll: bool = False,
) -> Decoder:
    """A Flax NNX decoder from a Hugging Face folder or hub id.

    Args:
        path: a folder with config.json and safetensors, or ``owner/name`` on the hub; None if ``config`` says it all.
        mesh: where the weights go, each device reading its own slices; None is the default device.
        rules: logical axes → mesh axes.
        dtype: of the computation; ``param_dtype``: of the weights as kept (None: the same). Training in bfloat16 wants
            ``dtype="bfloat16", param_dtype="float32"``.
        abstract: shapes, dtypes and (given a mesh) shardings only; no weight is read and no memory taken.
        init: "pretrained"; "random" (config.json alone is read); or layers of the model, such as ``(0, 3, 5)``: a
            student made of those blocks with the embedding, norms and head.
        seed: of random weights.
        config: entries that replace those of config.json, for a smaller random student of the same family.
        remat, attention, unroll: see ``Compute``.

    Raises:
        UserError: an unsupported configuration; tensors that are missing, unknown, misshaped, stored twice or cut off.
    """
    layers = None if isinstance(init, str) else tuple(init)
    if layers is None and init not in ("pretrained", "random"):
        raise UserError(f"model init: {init!r} is not 'pretrained', 'random' or a list of layers")
    if path is None:
        if init != "random":
            raise UserError("model: without a path there are no weights to load; give a path, or init 'random'")
        source = ModelConfig.from_hf(config or {}, "model config")
    else:
        folder = resolve(path, weights=init != "random" and not abstract)
        source = ModelConfig.from_folder(folder, **(config or {}))
    student = source if layers is None else source.with_layers(len(_checked(layers, source)))
    compute = Compute(
        dtype=dtype,
        param_dtype=param_dtype or dtype,
        remat=remat,
        attention=attention,
        unroll=unroll,
        rules=rules or Rules(),
    )
    if abstract:
        return abstract_model(student, compute, mesh)
    if init == "random":
        return init_model(student, compute, mesh, seed)
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check(source)
        values = {row.path: _read(checkpoint, row, source, layers, compute, mesh) for row in weight_table(student)}
    return _fill(student, compute, values.__getitem__)


def init_model(config: ModelConfig, compute: Compute | None = None, mesh: Mesh | None = None, seed: int = 0) -> Decoder:
    """Random weights, each made in place on the devices that keep it; the same numbers on every mesh."""
    model = abstract_model(config, compute)
    graph, _ = nnx.split(model)

    def make(key: jax.Array) -> nnx.State:
        return nnx.state(Decoder(config, model.compute, rngs=nnx.Rngs(params=key)))

    where = None if mesh is None else state_shardings(model, mesh)
    return nnx.merge(graph, jax.jit(make, out_shardings=where)(jax.random.key(seed)))


def abstract_model(config: ModelConfig, compute: Compute | None = None, mesh: Mesh | None = None) -> Decoder:
    """A model of ShapeDtypeStructs, with shardings where a mesh is given; to lower or restore against."""
    compute = compute or Compute()
    where = {} if mesh is None else param_shardings(config, mesh, compute.rules)
    shapes = {row.path: row.shape(config) for row in weight_table(config)}
    dtype = jnp.dtype(compute.param_dtype)
    return _fill(config, compute, lambda path: jax.ShapeDtypeStruct(shapes[path], dtype, sharding=where.get(path)))


def _checked(layers: tuple[int, ...], source: ModelConfig) -> tuple[int, ...]:
    for layer in layers:
        if not 0 <= layer < source.num_hidden_layers:
            raise UserError(f"model init: layer {layer} is not in 0 … {source.num_hidden_layers - 1}")
    if not layers:
        raise UserError("model init: the list of layers is empty")
    return layers


def _fill(config: ModelConfig, compute: Compute, value: Callable[[tuple[str, ...]], Any]) -> Decoder:
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, compute, rngs=nnx.Rngs(0))))
    filled = [(path, leaf.replace(value(path))) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _read(
    checkpoint: Checkpoint,
    row: Weight,
    source: ModelConfig,
    layers: tuple[int, ...] | None,
    compute: Compute,
    mesh: Mesh | None,
) -> jax.Array:
    """One parameter, every device's slice read once and only by its own index."""
    names = row.names(source)
    if row.stacked and layers is not None:
        names = [names[layer] for layer in layers]
    shape = (len(names), *row.part_shape(source)) if row.stacked else row.part_shape(source)
    dtype = jnp.dtype(compute.param_dtype)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        out = np.empty([s.stop - s.start for s in index], dtype)
        if row.stacked:
            for i, name in enumerate(names[index[0]]):
                out[i] = checkpoint.part(row, name, index[1:], source)
        else:
            out[...] = checkpoint.part(row, names[0], index, source)
        return out

    return placed(shape, None if mesh is None else compute.rules.sharding(mesh, row.axes, shape), read)
