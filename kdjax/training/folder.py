"""The folder of a run: one run at a time writes to it, and what stands there already is never lost by accident."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import ExitStack, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from kdjax.config import Config, to_yaml
from kdjax.config.identity import refuse_other_config
from kdjax.disk import write_whole
from kdjax.errors import UserError
from kdjax.models import recover_exports

LOCK, LOG, KNOWN, DONE = ".lock", "engine.log", "config.yaml", "result.json"
STUDENT_LOGS = "student[0-9]*.log"
# All that a run writes, as docs/concepts.md tells it. What else is in the folder is not the run's to remove: answers
# that another command wrote there by default, or a person's own files.
WRITTEN = (
    *(
        LOCK,
        LOG,
        KNOWN,
        DONE,
        "run.json",
        "metrics.jsonl",
        "tensorboard",
        "wandb",
        "wandb.id",
        "report.html",
        "figures",
    ),
    *("checkpoints", "best", "export", "export.log", "export_teacher", "damaged", "profile"),
    *("rollouts", "student", STUDENT_LOGS),
)
# An earlier run: on its way aside or back, wholly aside, and no longer wanted.
_MOVING, _ASIDE, _TRASH = ".replaced.part", ".replaced", ".discarded"


class RunFolder:
    """Opens ``config.output`` for writing, locked until ``close``.

    Until ``keep`` is called the run has only been tried: closing then puts the folder back as it was, an earlier run
    that ``overwrite`` is to replace included, so that a fault in the configuration or the data costs nothing. What no
    run writes stays where it is. The lock goes with the process, so a dead run's does not last.

    Raises UserError when another run holds the folder, when it holds a finished run or one of another configuration,
    or when it cannot be written.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.output)
        self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self._before: set[str] | None = None
        self._known: str | None = None  # what config.yaml said
        self._kept, self._new_lock = False, not (self.path / LOCK).exists()
        self._file: Any = None
        with ExitStack() as opened:
            opened.callback(self.close)
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock()
                self._recover()
                self._check(config)
                self._before = {entry.name for entry in self.path.iterdir()}
                if KNOWN in self._before and config.overwrite:
                    self._set_aside()
                elif KNOWN in self._before:
                    self._known = (self.path / KNOWN).read_text(encoding="utf-8")
                write_whole(self.path / KNOWN, to_yaml(config))
            except OSError as error:
                raise UserError(f"output={self.path}: cannot be written ({error.strerror}); choose another") from None
            opened.pop_all()  # all is well: the run closes it

    def keep(self) -> None:
        """From here on the folder is this run's, whatever becomes of it."""
        if not self._kept:
            self._kept = True
            if (self.path / _ASIDE).exists():
                (self.path / _ASIDE).rename(self.path / _TRASH)
                shutil.rmtree(self.path / _TRASH)

    def finish(self, result: dict[str, Any]) -> None:
        """Write what the run came to; from now on starting it again is refused."""
        write_whole(self.path / DONE, json.dumps(result, indent=2) + "\n")

    def close(self, keep_log: bool = False) -> None:
        """Unlock the folder; if the run was only tried, put it back, all but the engines' logs if that is wanted."""
        if self._file is None:
            return
        if not self._kept and self._before is not None:
            logs = [LOG, *(path.name for path in self.path.glob(STUDENT_LOGS))] if keep_log else []
            self._put_back({*self._before, LOCK, *logs})
            if self._known is not None:
                write_whole(self.path / KNOWN, self._known)
        if not self._kept and self._new_lock:
            (self.path / LOCK).unlink()
            with suppress(OSError):  # something else is in it by now
                for made in self._made:
                    made.rmdir()
        self._file.close()
        self._file = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self.close(keep_log=kind is not UserError)

    def _lock(self) -> None:
        while True:
            file = (self.path / LOCK).open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                message = f"{self.path}: another run writes there; wait for it, or choose another output"
                raise UserError(message) from None
            if os.fstat(file.fileno()).st_nlink:  # else whoever held it removed it just now
                self._file = file
                return
            file.close()

    def _recover(self) -> None:
        """Undo what a process that was killed left half done."""
        shutil.rmtree(self.path / _TRASH, ignore_errors=True)
        if (self.path / _ASIDE).exists():  # it had only been tried
            self._put_back({LOCK, LOG})
        self._move_back()
        recover_exports(self.path, WRITTEN)

    def _check(self, config: Config) -> None:
        known, saved = self.path / KNOWN, self.path / "checkpoints"
        if config.overwrite or not saved.exists() or not any(saved.iterdir()):
            return
        if not config.checkpoint.resume:
            raise UserError(
                f"{self.path} holds a run and checkpoint.resume is false; choose another output, or overwrite=true"
            )
        if not known.exists():
            raise UserError(f"{self.path} holds checkpoints and no config.yaml; choose another output")
        try:
            values = yaml.safe_load(known.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            values = None
        if not isinstance(values, dict):
            raise UserError(f"{known}: damaged, so it is unknown whose checkpoints these are; choose another output")
        refuse_other_config(values, config)
        if (self.path / DONE).exists() and (self.path / "export").exists():
            raise UserError(
                f"{self.path} holds this run, finished, its student in {self.path}/export; "
                "choose another output, or start anew with overwrite=true"
            )

    def _set_aside(self) -> None:
        moving = self.path / _MOVING
        moving.mkdir()
        for entry in self._written():
            if entry.name not in (LOCK, LOG):
                entry.rename(moving / entry.name)
        moving.rename(self.path / _ASIDE)

    def _put_back(self, stays: set[str]) -> None:
        """Remove what this run wrote but for ``stays``; move an earlier run that was set aside back into its place."""
        aside = self.path / _ASIDE
        stays = (stays & {LOCK, LOG}) if aside.exists() else stays
        for entry in self._written():
            if entry.name not in stays:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if aside.exists():
            aside.rename(self.path / _MOVING)
            self._move_back()

    def _written(self) -> list[Path]:
        return [path for path in self.path.iterdir() if any(fnmatchcase(path.name, name) for name in WRITTEN)]

    def _move_back(self) -> None:
        moving = self.path / _MOVING
        if moving.exists():
            for entry in list(moving.iterdir()):
                entry.rename(self.path / entry.name)
            moving.rmdir()
