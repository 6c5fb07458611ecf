"""A teacher that is an earlier self of the student, or an average of its earlier selves."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import jax
from flax import nnx

from bridge.client import RemoteEngine
from bridge.errors import EngineError
from kdjax.head import Head
from kdjax.rollouts.turns import Turns
from kdjax.rollouts.weights import send, student_label
from kdjax.training.step import Step


class SelfTeacher:
    """Every ``every`` steps the teacher becomes ``decay`` · teacher + (1 − ``decay``) · student.

    Decay 0 is a copy of the student; above it an exponential moving average (Mean Teacher, 1703.01780). ``params`` are
    the very weights that the teacher's engine gets by ``send``, laid out like the student's; they are saved with the
    run. ``version`` is the step that made them.

    Args:
        step: what trains the student.
        engine: runs the teacher; it started with the weights that the student starts with.
        head: the teacher's, as the engine starts; later ones replace its weight.
    """

    def __init__(
        self, step: Step, engine: RemoteEngine, head: Head, *, every: int, decay: float, bucket_bytes: int
    ) -> None:
        self._step, self._engine, self._head = step, engine, head
        self._every, self._decay, self._bucket_bytes = every, decay, bucket_bytes
        graph, params, rest = nnx.split(step.model, nnx.Param, ...)
        where = jax.tree.map(lambda x: x.sharding, params)
        copy = jax.jit(lambda tree: jax.tree.map(jax.numpy.copy, tree), out_shardings=where)
        self.model = nnx.merge(graph, copy(params), rest)
        self._average = jax.jit(
            lambda mine, new: jax.tree.map(lambda a, b: (decay * a + (1 - decay) * b).astype(a.dtype), mine, new),
            out_shardings=where,
        )
        self.version = self._ready = 0
        self.turns = Turns()
        self._changed, self._closed = threading.Condition(), False

    @property
    def params(self) -> Any:
        """The teacher's weights, a tree like ``step.state["params"]["student"]``."""
        return nnx.state(self.model, nnx.Param)

    @property
    def state(self) -> dict[str, Any]:
        """What is saved: a checkpoint may be written before or after the teacher learnt from its step."""
        version = jax.device_put(jax.numpy.int32(self.version), self._step.state["step"].sharding)
        return {"params": self.params, "version": version}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved ``state``."""
        nnx.update(self.model, state["params"])
        self.version, self._ready = int(state["version"]), -1

    def learn(self) -> None:
        """Learn from the student if it is time."""
        due = self._due(self._step.number)
        if due > self.version:
            nnx.update(self.model, self._average(self.params, self._step.state["params"]["student"]))
            self.version = due

    def follow(self) -> None:
        """Learn from the student if it is time, and bring the step's head up to date."""
        self.learn()
        if self._ready == self.version:
            return
        weight = self.model.head().weight.astype(self._head.weight.dtype)
        self._step.replace_heads(replace(self._head, weight=weight))
        with self._changed:
            self._ready = self.version
            self._changed.notify_all()

    def send(self) -> None:
        """Give the engine these weights, unless it has them: to be called before it is asked, again where it died.

        Raises EngineError that names where it broke off.
        """
        engine = self._engine
        label = student_label(self.version) if self._decay == 0 else ("teacher", self.version)
        if engine.holds == label or (engine.holds is None and self.version == 0):
            return
        self.turns.enter("renew")
        send(engine, self.model, version=self.version, whose="teacher", label=label, bucket_bytes=self._bucket_bytes)

    def needed(self, number: int) -> int:
        """The step whose weights teach step ``number``."""
        return self._due(number - 1)

    def wait_for(self, number: int) -> None:
        """Until the weights of step ``number``'s teacher are there. Raises EngineError once this is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ready >= self.needed(number))
        if self._closed:
            raise EngineError("the teacher is closed")

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _due(self, done: int) -> int:
        return done // self._every * self._every
