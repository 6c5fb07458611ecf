"""Who may hold the devices' memory now, where engines and trainer share them: one small state machine.

A step goes round ``train`` → ``sync`` → ``renew`` → ``generate`` → ``prefill`` → ``train``; what a run lacks is left
out. Engines sleep outside their phases; awake they live in what JAX's fixed share of the memory leaves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bridge.engine import Engine

WEIGHTS, CACHE = "weights", "kv_cache"
# Phase → who is awake with what. New weights need room for weights alone: for the student's, or an earlier self's.
AWAKE: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {},
    "sync": {"student": (WEIGHTS,)},
    "renew": {"teacher": (WEIGHTS,)},
    "generate": {"student": (WEIGHTS, CACHE)},
    "prefill": {"teacher": (WEIGHTS, CACHE)},
}
NEXT = {
    "train": ("sync", "renew", "generate", "prefill"),
    "sync": ("renew", "generate", "prefill"),
    "renew": ("sync", "generate", "prefill"),  # one engine in both roles takes the weights of each in turn
    "generate": ("renew", "prefill", "train"),
    "prefill": ("renew", "train"),  # a teacher that was started again gets its weights again
}


class Turns:
    """The engines by role (``student``, ``teacher``), awake when this starts; without engines nothing is ever asked.

    One engine may have both roles. ``kept`` are tags that stay on the devices outside a role's phases.
    """

    def __init__(
        self, engines: Mapping[str, Sequence[Engine]] | None = None, kept: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self._engines: list[Engine] = []
        self._roles: list[set[str]] = []
        for role, of_role in (engines or {}).items():
            for engine in of_role:
                if engine not in self._engines:
                    self._engines.append(engine)
                    self._roles.append(set())
                self._roles[self._engines.index(engine)].add(role)
        self._kept = dict(kept or {})
        self._awake = [{WEIGHTS, CACHE} for _ in self._engines]
        self.phase = "train"

    def enter(self, phase: str) -> None:
        """Let ``phase`` begin: first those that must sleep do, then those that are needed wake.

        Raises ValueError for a phase that cannot follow the present one, EngineError from the engines.
        """
        if not self._engines:
            return
        if phase != self.phase and phase not in NEXT[self.phase]:
            raise ValueError(f"{phase} cannot follow {self.phase}")
        wanted = [
            {tag for role in roles for tag in (*self._kept.get(role, ()), *AWAKE[phase].get(role, ()))}
            for roles in self._roles
        ]
        for engine, awake, tags in zip(self._engines, self._awake, wanted, strict=True):
            if awake - tags:
                engine.sleep(sorted(awake - tags))
        for engine, awake, tags in zip(self._engines, self._awake, wanted, strict=True):
            if tags - awake:
                engine.wake(sorted(tags - awake))
        self._awake, self.phase = wanted, phase

    def restarted(self, engine: Engine) -> None:
        """A new process took the place of ``engine``'s: it is wide awake, whatever the phase."""
        if engine in self._engines:
            self._awake[self._engines.index(engine)] = {WEIGHTS, CACHE}
            self.enter(self.phase)
