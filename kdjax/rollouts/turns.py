"""Who may hold the devices' memory now, where engines and trainer share them: one small state machine.

A step goes round ``train`` → ``sync`` → ``renew`` → ``generate`` → ``prefill`` → ``train``; what a run lacks is left
out. Engines sleep outside their phases; awake they live in what JAX's fixed share of the memory leaves them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bridge.errors import EngineError

WEIGHTS, CACHE = "weights", "kv_cache"
# Phase → who is awake with what. New weights need room for weights alone: for the student's, or an earlier self's.
AWAKE: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {"trainer": (WEIGHTS,)},
    "sync": {"trainer": (WEIGHTS,), "student": (WEIGHTS,)},
    "renew": {"trainer": (WEIGHTS,), "teacher": (WEIGHTS,)},
    "generate": {"student": (WEIGHTS, CACHE)},
    # One engine was started again and needs weights while another may be writing: that one must stay as it is.
    "resend": {"trainer": (WEIGHTS,), "student": (WEIGHTS, CACHE)},
    "prefill": {"teacher": (WEIGHTS, CACHE)},
}
NEXT = {
    "train": ("sync", "renew", "generate", "prefill"),
    "sync": ("renew", "generate", "prefill", "train"),  # at once where a step read back from disk has no row to judge
    "renew": ("sync", "generate", "prefill"),  # one engine in both roles takes the weights of each in turn
    "generate": ("resend", "renew", "prefill", "train"),
    "resend": ("generate",),
    "prefill": ("renew", "train"),  # a teacher that was started again gets its weights again
}


class Sleeper(Protocol):
    """What takes turns: an engine, or the trainer. ``pid`` is None while it is dead, and then it holds no memory."""

    pid: int | None

    def sleep(self, tags: Sequence[str]) -> None: ...

    def wake(self, tags: Sequence[str]) -> None: ...


@dataclass
class _Seat:
    """One who takes turns: its roles, and the tags with which it is awake."""

    engine: Sleeper
    awake: set[str]
    roles: set[str] = field(default_factory=set)


class Turns:
    """Those who take turns by role (``student``, ``teacher``, ``trainer``); without any nothing is ever asked.

    One engine may have both roles. ``kept`` are tags that stay on the devices outside a role's phases. An engine that
    is dead is passed over: whoever needs it starts it again and says so by ``restarted``. Several threads may call.
    """

    def __init__(self, kept: Mapping[str, Sequence[str]] | None = None) -> None:
        self._seats: list[_Seat] = []
        self._kept = dict(kept or {})
        self._lock = threading.RLock()  # engines of one phase are asked, and found dead, by a thread each
        self.phase = "train"

    def join(self, role: str, engines: Sequence[Sleeper], awake: Collection[str] = (WEIGHTS, CACHE)) -> None:
        """Give these a role. Those who were not there before are ``awake``; they are put to where they belong."""
        with self._lock:
            for engine in engines:
                seat = self._seat(engine)
                if seat is None:
                    self._seats.append(seat := _Seat(engine, set(awake)))
                seat.roles.add(role)
            self._settle()

    def enter(self, phase: str) -> None:
        """Let ``phase`` begin: first those that must sleep do, then those that are needed wake.

        Raises ValueError for a phase that cannot follow the present one, EngineError from engines that live.
        """
        with self._lock:
            if not self._seats:
                return
            if phase != self.phase and phase not in NEXT[self.phase]:
                raise ValueError(f"{phase} cannot follow {self.phase}")
            self.phase = phase
            self._settle()

    def restarted(self, engine: Sleeper) -> None:
        """A new process took the place of ``engine``'s: it is wide awake, whatever the phase."""
        with self._lock:
            if (seat := self._seat(engine)) is not None:
                seat.awake = {WEIGHTS, CACHE}
                self._settle()

    def _seat(self, engine: Sleeper) -> _Seat | None:
        return next((seat for seat in self._seats if seat.engine == engine), None)

    def _settle(self) -> None:
        for seat in self._seats:
            if _asked(seat.engine, seat.engine.sleep, surplus := seat.awake - self._wanted(seat.roles)):
                seat.awake -= surplus
        for seat in self._seats:
            if _asked(seat.engine, seat.engine.wake, missing := self._wanted(seat.roles) - seat.awake):
                seat.awake |= missing

    def _wanted(self, roles: Collection[str]) -> set[str]:
        phase = AWAKE[self.phase]
        return {tag for role in roles for tag in (*self._kept.get(role, ()), *phase.get(role, ()))}


def _asked(engine: Sleeper, call: Callable[[Sequence[str]], None], tags: Collection[str]) -> bool:
    """Whether ``call(tags)`` was made and answered; not where there is nothing to ask, nor by an engine that is dead.

    Raises EngineError from one that lives.
    """
    if not tags or engine.pid is None:
        return False
    try:
        call(sorted(tags))
    except EngineError:
        if engine.pid is not None:
            raise
        return False
    return True
