"""The transformers engine inside the test's own process: what a run does with engines, without waiting for them."""

from __future__ import annotations

from pathlib import Path

from bridge.client import RemoteEngine, read_facts
from bridge.engine import EngineSpec
from bridge.errors import EngineError


class LocalEngine(RemoteEngine):
    """A RemoteEngine whose other side is an object. ``calls`` are its calls' names in order.

    ``deaths`` and ``hangs`` name calls that kill it or miss their deadline: each is struck off when it has happened.
    """

    def __init__(self, model, *, kind, log, pool=None, dtype=None, options=None, **_):
        spec = EngineSpec(
            kind="transformers",
            model=str(model),
            dtype=dtype or (read_facts(Path(model)).dtype if pool is None else pool.spec.dtype),
            device="cpu",
            pool=None if pool is None else pool.spec,
            options=dict(options or {}),
        )
        self.calls, self.deaths, self.hangs, self.starts = [], [], [], 0
        super().__init__(spec, pool, Path(log), 60.0, 60.0)

    @property
    def pid(self):
        return None if self._server is None else 1

    def wait_ready(self):
        pass

    def close(self, timeout=0.0):
        self.kill()

    def _launch(self):
        from bridge.host import Host
        from bridge.sglang_platform import mend_torchvision

        if self._closed:
            raise EngineError(f"{self._name()} is closed")
        mend_torchvision()
        self.holds, self._server, self.starts = None, Host(self.spec), self.starts + 1
        self.max_tokens = self._server.max_tokens

    def _stop(self):
        self._server = None
        self._let_go()

    def _call(self, method, args, timeout, deadline=None):
        with self._turn:
            self.calls.append(method)
            if method in self.hangs:
                self.hangs.remove(method)
                self.log.touch()
                self._missed(method, round(timeout or self.call_timeout))
            if method in self.deaths:
                self.deaths.remove(method)
                self._server = None
            if self._server is None:
                raise EngineError(f"engine {Path(self.spec.model).name} died (signal SIGKILL) during {method}")
            return self._server.call(method, args)
