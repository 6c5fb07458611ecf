"""The one compiled step: gradients of the algorithm's terms, summed over micro-batches, and an optimizer update."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from kdjax.algorithms.base import Frozen, Term
from kdjax.data.batch import Batch
from kdjax.errors import UserError
from kdjax.head import Head
from kdjax.training.device_batch import DeviceBatch

Metrics = dict[str, jax.Array]


class Step:
    """A jit-compiled training step over a model and an algorithm that it keeps current.

    Calling it with a device batch (arrays stacked ``[A, ...]`` over micro-batches) dispatches one update and returns
    float32 scalars without waiting: ``loss``, each term as Σsum/Σcount, ``grad_norm`` and ``loss_tokens``. The state
    (float32 masters, optimizer moments, step number) is donated, so it exists once; ``model`` and ``algorithm`` always
    hold the newest parameters. ``number`` steps have made them; whoever reads them from another thread holds ``lock``,
    or the next step would take their memory away.

    With a teacher, ``teacher_bad_rows`` counts rows that carry loss and hold NaN or Inf. Where there is one, or where
    loss or gradient are not finite, the state stays as it was.

    ``offload`` names what waits in pinned host memory: the ``optimizer``'s moments whenever no update needs them, so
    that a device never holds them beside the activations (ZeRO-Offload, 2101.06840, without its update on the host),
    and the ``parameters`` between ``park`` and ``unpark``.
    """

    def __init__(
        self,
        model: nnx.Module,
        algorithm: nnx.Module,
        optimizer: optax.GradientTransformation,
        mesh: Mesh | None = None,
        offload: Collection[str] = (),
    ) -> None:
        self.model, self.algorithm, self.mesh = model, algorithm, mesh or _mesh_of(model)
        if jax.tree.leaves(nnx.state(algorithm, nnx.RngState)):
            raise UserError(
                f"distill.algorithm: {type(algorithm).__name__} keeps random numbers (nnx.Rngs), which would be the "
                f"same at every step; use what it is given for its parameters' initial values alone"
            )
        self.number, self.lock = 0, threading.Lock()
        self._graphs, params, self._frozen = _split(model, algorithm)
        replicated = NamedSharding(self.mesh, P())
        on_mesh = partial(_on_mesh, replicated=replicated)
        params, self._frozen = jax.tree.map(on_mesh, (params, self._frozen))
        # Moments are made like the parameters one by one, outside jit, and so lie where the parameters lie.
        opt = jax.tree.map(on_mesh, optimizer.init(params))
        state = {"params": params, "opt": opt, "step": jax.device_put(jnp.zeros((), jnp.int32), replicated)}
        self.state, self.shardings = state, jax.tree.map(lambda x: x.sharding, state)
        self._on_device, self._on_host, moments = self.shardings, None, None
        if offload:
            self._on_host = jax.tree.map(_in_host_memory, state)
        if "optimizer" in offload:
            moments, self.shardings = self._on_device["opt"], self._on_device | {"opt": self._on_host["opt"]}
            self.state = jax.device_put(state, self.shardings)
        graphs = self._graphs
        self._update = jax.jit(
            lambda state, frozen, batch: _update(graphs, optimizer, state, frozen, batch, moments),
            donate_argnums=0,
            out_shardings=(self.shardings, replicated, replicated, replicated),
        )
        self._sound = jax.jit(lambda params, frozen, batch: _is_sound(_differentiate(graphs, params, frozen, batch)))

    def __call__(self, batch: DeviceBatch | Batch) -> Metrics:
        with self.lock, jax.set_mesh(self.mesh):
            self.state, metrics, verdict, by_row = self._update(self.state, self._frozen, _arrays(batch))
            self.number += 1
            self._publish()
        if isinstance(batch, DeviceBatch):
            batch.release_after(verdict)
            batch.by_row = by_row
        return metrics

    def reports(self, batch: DeviceBatch | Batch) -> set[str]:
        """The names of what a step on ``batch`` would return; traces, and neither compiles nor computes anything."""
        with self.lock, jax.set_mesh(self.mesh):
            return set(self._update.eval_shape(self.state, self._frozen, _arrays(batch))[1])

    def sound(self, arrays: Batch) -> bool:
        """Whether loss and gradient of a batch are finite under the parameters as they are; changes nothing."""
        with jax.set_mesh(self.mesh):
            return bool(self._sound(self.state["params"], self._frozen, arrays))

    def replace_heads(self, head: Head) -> None:
        """From now on the algorithm's teacher has ``head``: one that follows the student. No second compilation."""

        def changed(variable: Any) -> Any:
            is_head = isinstance(variable, Frozen) and isinstance(variable.get_value(), Head)
            return variable.replace(head) if is_head else variable

        is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        self._frozen["extra"] = jax.tree.map(changed, self._frozen["extra"], is_leaf=is_variable)

    def whole_state(self) -> dict[str, Any]:
        """``state`` with all of it in device memory: what is saved, and how what was saved is laid out."""
        return jax.device_put(self.state, self._on_device) if self._on_host else self.state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved ``whole_state``."""
        self.state, self.number = state, int(state["step"])
        if self._on_host:
            self.state = jax.device_put(state, self.shardings)
        self._publish()

    def park(self) -> None:
        """Put the parameters away into pinned host memory. No step can be taken until ``unpark``."""
        self._move(self._on_host["params"])

    def unpark(self) -> None:
        self._move(self._on_device["params"])

    def _move(self, where: Any) -> None:
        with self.lock:
            old = self.state["params"]
            self.state["params"] = jax.block_until_ready(jax.device_put(old, where))
            self._publish()
            for x, there in zip(jax.tree.leaves(old), jax.tree.leaves(where), strict=True):
                if x.sharding.memory_kind != there.memory_kind:  # JAX cannot donate from one kind to another
                    x.delete()

    def _publish(self) -> None:
        nnx.update(self.model, self.state["params"]["student"])
        nnx.update(self.algorithm, self.state["params"]["extra"])


class Parked:
    """A step's parameters as one who takes turns on the devices: asleep they wait in pinned host memory."""

    def __init__(self, step: Step) -> None:
        self._step, self.pid = step, os.getpid()

    def sleep(self, tags: Sequence[str]) -> None:
        self._step.park()

    def wake(self, tags: Sequence[str]) -> None:
        self._step.unpark()


def make_step(
    model: nnx.Module,
    algorithm: nnx.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    offload: Collection[str] = (),
) -> Step:
    """Compile-once training step; see ``Step``. ``mesh`` defaults to the one that the model's parameters live on.

    Raises UserError for an algorithm that keeps random numbers (nnx.Rngs).
    """
    return Step(model, algorithm, optimizer, mesh, offload)


def _arrays(batch: DeviceBatch | Batch) -> Batch:
    return batch.arrays if isinstance(batch, DeviceBatch) else batch


def _on_mesh(x: jax.Array, replicated: NamedSharding) -> jax.Array:
    """``x`` as it is if it lies on the mesh already, else a copy on every device."""
    return (
        x
        if isinstance(x.sharding, NamedSharding) and x.sharding.mesh == replicated.mesh
        else jax.device_put(x, replicated)
    )


def _in_host_memory(x: jax.Array) -> Any:
    """Where ``x`` waits on the host, split as it is on the devices; a lone number stays there."""
    return x.sharding.with_memory_kind("pinned_host") if x.ndim else x.sharding


def _split(model: nnx.Module, algorithm: nnx.Module) -> tuple[Any, dict, dict]:
    student_graph, student, student_rest = nnx.split(model, nnx.Param, ...)
    algorithm_graph, extra, algorithm_rest = nnx.split(algorithm, nnx.Param, ...)
    return (
        (student_graph, algorithm_graph),
        {"student": student, "extra": extra},
        {"student": student_rest, "extra": algorithm_rest},
    )


def _update(
    graphs: Any, optimizer: optax.GradientTransformation, state: dict, frozen: dict, batch: Batch, moments: Any = None
) -> Any:
    """The new state, the metrics of one global batch, a verdict, and what its terms say of each row, [A, N].

    The state comes first, and all of it: CUDA results were seen to be wrong where donated buffers came behind others
    (github.com/jax-ml/jax/issues/39625).

    The verdict is 0.0, or NaN where the batch changed nothing. Optimizer state on the host comes to where ``moments``
    says, to be updated.
    """
    params = state["params"]
    total, shares, grads, by_row = _differentiate(graphs, params, frozen, batch)
    with jax.named_scope("optimizer"):
        if moments is not None:
            state = state | {"opt": jax.device_put(state["opt"], moments)}
        updates, opt = optimizer.update(grads, state["opt"], params)
        new = {"params": optax.apply_updates(params, updates), "opt": opt, "step": state["step"] + 1}
    metrics = shares | {"loss": total, "grad_norm": optax.tree.norm(grads)}
    sound = _is_sound((total, shares, grads, by_row))
    if batch.teacher_hidden:
        bad = [~jnp.isfinite(rows).all(-1) & batch.mask for rows in batch.teacher_hidden]
        metrics["teacher_bad_rows"] = sum(rows.sum() for rows in bad).astype(jnp.float32)
        sound &= metrics["teacher_bad_rows"] == 0
    # One scalar decides for every array, so this is part of the update's own pass over them.
    new = jax.tree.map(lambda new, old: jnp.where(sound, new, old), new, state)
    metrics |= {"loss_tokens": batch.mask.sum().astype(jnp.float32)}
    return new, metrics, jnp.where(sound, 0.0, jnp.nan), by_row


def _is_sound(differentiated: tuple[jax.Array, Metrics, Any, Metrics]) -> jax.Array:
    total, _, grads, _ = differentiated
    return jnp.isfinite(total) & jnp.isfinite(optax.tree.norm(grads))


def _differentiate(graphs: Any, params: dict, frozen: dict, batch: Batch) -> tuple[jax.Array, Metrics, Any, Metrics]:
    """The loss of one global batch, its parts, its gradient, and what its terms say of each row."""

    def terms(params: dict, micro: Batch) -> dict[str, Term]:
        student = nnx.merge(graphs[0], params["student"], frozen["student"])
        return nnx.merge(graphs[1], params["extra"], frozen["extra"])(student, micro)

    def loss(params: dict, micro: Batch, counts: dict[str, jax.Array] | None) -> tuple[jax.Array, tuple[Metrics, dict]]:
        out = terms(params, micro)
        counts = {name: term.count for name, term in out.items()} if counts is None else counts
        # A batch without a single position of some kind leaves that term out rather than dividing by zero.
        shares = {name: t.sum / jax.lax.stop_gradient(jnp.maximum(counts[name], 1.0)) for name, t in out.items()}
        by_row = {name: term.rows for name, term in out.items() if term.rows is not None}
        return sum((out[name].weight * share for name, share in shares.items()), jnp.float32(0)), (shares, by_row)

    gradient = jax.value_and_grad(loss, has_aux=True)
    if batch.tokens.shape[0] == 1:
        (total, (shares, by_row)), grads = gradient(params, jax.tree.map(lambda x: x[0], batch), None)
        by_row = jax.tree.map(lambda x: x[None], by_row)
    else:
        # Counts depend on masks only, so the compiler drops everything else of this pass.
        counts = jax.lax.map(lambda micro: {name: t.count for name, t in terms(params, micro).items()}, batch)
        counts = jax.tree.map(lambda c: c.sum(0), counts)

        def accumulate(sums: Any, micro: Batch) -> tuple[Any, dict]:
            (total, (shares, by_row)), grads = gradient(params, micro, counts)
            return jax.tree.map(jnp.add, sums, (total, shares, grads)), by_row

        first = jax.tree.map(lambda x: x[0], batch)
        (total, (shares, _)), grads = jax.eval_shape(gradient, params, first, counts)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (total, shares, grads))
        (total, shares, grads), by_row = jax.lax.scan(accumulate, zeros, batch)
    return total, shares, grads, by_row


def _mesh_of(model: nnx.Module) -> Mesh:
    sharding = jax.tree.leaves(nnx.state(model, nnx.Param))[0].sharding
    return (
        sharding.mesh
        if isinstance(sharding, NamedSharding)
        else jax.make_mesh(
            (1, 1, 1),
            ("data", "fsdp", "tensor"),
            axis_types=(jax.sharding.AxisType.Auto,) * 3,
            devices=list(sharding.device_set)[:1],
        )
    )
