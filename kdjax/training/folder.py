"""The folder of a run: one run at a time writes to it, and what stands there already is never lost by accident."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from typing import Any

import yaml

from kdjax.config import Config, to_yaml
from kdjax.errors import UserError
from kdjax.training.checkpoint import refuse_other_config


class RunFolder:
    """Opens ``config.output`` for writing, locked until ``close``.

    The lock goes with the process, so a dead run's does not last. Raises UserError when another run holds the folder,
    when it holds a run of another configuration, or when it cannot be written.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.output)
        self._file = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._check(config)
            (self.path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        except OSError as error:
            self.close()
            raise UserError(f"output={self.path}: cannot be written ({error.strerror}); choose another") from None
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        self._file = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another run writes there; wait for it, or choose another output") from None

    def _check(self, config: Config) -> None:
        saved = self.path / "checkpoints"
        known = self.path / "config.yaml"
        if config.overwrite and known.exists():
            for entry in self.path.iterdir():
                if entry.name != ".lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        elif saved.exists() and any(saved.iterdir()):
            if not config.checkpoint.resume:
                raise UserError(
                    f"{self.path} holds a run and checkpoint.resume is false; choose another output, or overwrite=true"
                )
            if not known.exists():
                raise UserError(f"{self.path} holds checkpoints and no config.yaml; choose another output")
            refuse_other_config(yaml.safe_load(known.read_text()), config)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
