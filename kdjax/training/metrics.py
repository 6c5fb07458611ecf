"""Where numbers go: each place is a sink of a few lines, and a record is what one step says, by name."""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol

from kdjax.config import Config, LogConfig, to_dict
from kdjax.disk import write_whole
from kdjax.errors import UserError

FILE = "metrics.jsonl"


class Sink(Protocol):
    """A place to write to. Names with a slash are grouped by what stands before it."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Sends records of ``{name: number}`` to ``metrics.jsonl`` and to whatever else ``config.log`` asks for.

    Args:
        resumed_at: the step that a run goes on from; later records of the interrupted run will come again.

    Raises UserError when W&B cannot be reached.
    """

    def __init__(self, folder: Path, config: Config, resumed_at: int = 0) -> None:
        with ExitStack() as opened:
            sinks: list[Sink] = [opened.enter_context(closing(JsonLines(folder, resumed_at)))]
            if config.log.tensorboard:
                sinks.append(opened.enter_context(closing(TensorBoard(folder, resumed_at))))
            if config.log.wandb:
                sinks.append(opened.enter_context(closing(WeightsAndBiases(folder, config))))
            self._sinks, self._opened = sinks, opened.pop_all()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Record scalars of ``step``."""
        numbers = {name: float(value) for name, value in values.items()}
        for sink in self._sinks:
            sink.write(step, numbers)

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class JsonLines:
    """``metrics.jsonl``: one object a line with ``step``, ``time`` (Unix seconds) and the numbers."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        path = folder / FILE
        kept = [record for record in read_metrics(path) if record["step"] <= resumed_at] if resumed_at else []
        write_whole(path, "".join(map(_line, kept)))  # at no moment is there a file without the earlier records
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(_line({"step": step, "time": round(time.time(), 3)} | dict(values)))

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files under ``tensorboard/``."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        # Imports torch where it is installed: in a run only, never by `import kdjax`.
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, number in values.items():
            self._events.add_scalar(name, number, step)

    def close(self) -> None:
        self._events.close()


class WeightsAndBiases:
    """A run of W&B with the whole configuration; a resumed run goes on in the same one, known by ``wandb.id``."""

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        log, known = config.log, folder / "wandb.id"
        if not known.exists():
            known.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=log.wandb_project,
                entity=log.wandb_entity,
                group=log.wandb_group,
                name=log.wandb_name or folder.name,
                mode=log.wandb_mode,
                id=known.read_text(),
                resume="allow",
                dir=folder,
                config=to_dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"log.wandb: {' '.join(str(error).split())}; log in by `wandb login`, or set log.wandb_mode=offline"
            ) from None
        self._run.define_metric("*", step_metric="step")  # W&B's own counter would refuse steps that come again

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step} | dict(values))

    def close(self) -> None:
        self._run.finish()


def check_log(log: LogConfig) -> None:
    """Refuse a sink that is not installed, before anything is loaded. Raises UserError."""
    if log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("log.wandb: the package wandb is not installed; pip install wandb, or set log.wandb=false")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a ``metrics.jsonl``, in order; none where there is no file.

    A line that a killed run left torn is passed over: what it would have said comes again when the run goes on.
    """
    if not path.exists():
        return []
    return list(_records(path.read_text(encoding="utf-8", errors="replace").splitlines()))


def _records(lines: Iterable[str]) -> Iterable[dict[str, float]]:
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield {name: value if name == "step" else float(value) for name, value in record.items()}


def _line(record: Mapping[str, float]) -> str:
    # JSON has no NaN: a number that is not finite is written as text, and read back by float().
    return json.dumps({n: v if math.isfinite(v) else str(v) for n, v in record.items()}) + "\n"
