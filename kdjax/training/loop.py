"""The one training loop: take a batch, step, now and then look, save and evaluate; at the end export and prove it.

Off-policy distillation and supervised fine-tuning differ in the stream that ``config`` describes, never here.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import yaml
from flax import nnx

from kdjax.algorithms import make_algorithm
from kdjax.config import Config, to_yaml
from kdjax.errors import UserError
from kdjax.models import export_hf
from kdjax.training.checkpoint import Checkpoints, refuse_other_config
from kdjax.training.evaluation import Evaluator
from kdjax.training.metrics import Metrics
from kdjax.training.optimizer import make_optimizer, make_schedule
from kdjax.training.preflight import check_export, check_teacher
from kdjax.training.progress import Display
from kdjax.training.sources import Stream
from kdjax.training.step import make_step
from kdjax.training.student import make_student


@dataclass
class Result:
    """What a run came to."""

    steps: int
    export: Path
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    """Step → held-out numbers; 0 is before training."""
    kept_step: int = 0
    """The step whose weights were exported."""


def train(config: Config, display: Display | None = None) -> Result:
    """Run ``config`` from start, or from the newest checkpoint in its output folder, to an exported student.

    Raises UserError for anything that the configuration or the data can mend.
    """
    return _Run(config, display or Display()).run()


class _Run:
    def __init__(self, config: Config, display: Display) -> None:
        self.config, self.display = config, display
        self.folder = Path(config.output)
        self.result = Result(0, self.folder / "export")
        self.best: tuple[float, int, Any] | None = None

    def run(self) -> Result:
        config, display = self.config, self.display
        self._open_folder()
        with Stream(config, log=self.folder / "engine.log") as self.stream:
            self.steps = config.train.steps or self.stream.data.estimate_batches(config.train.epochs)
            with display.stage("student"):
                self.model = make_student(config, self.stream.mesh)
                algorithm = make_algorithm(config, self.model, self.stream.teachers, seed=config.train.seed)
                self.step = make_step(self.model, algorithm, make_optimizer(config.train, self.steps), self.stream.mesh)
            if config.teacher.path is not None:
                with display.stage(f"teacher ({config.teacher.engine})"):
                    self.stream.wait_ready()
                if config.teacher.preflight:
                    with display.stage("preflight"):
                        check_teacher(self.stream)
            self.checkpoints = Checkpoints(self.folder / "checkpoints", config.checkpoint)
            start = self._resume()
            self.metrics = Metrics(self.folder, config.log.tensorboard, start)
            with display.stage("held-out rows"):
                self.held_out = self.stream.evaluation() if config.data.eval else []
            self.evaluate = Evaluator(self.model, self.stream.teachers, self.stream.mesh)
            if start == 0:
                self._evaluate(0)
            try:
                with display.bar(self.steps, start):
                    self._loop(start)
                self._finish()
            finally:
                self.checkpoints.close()
                self.metrics.close()
        return self.result

    def _open_folder(self) -> None:
        config_file, saved = self.folder / "config.yaml", self.folder / "checkpoints"
        if self.config.overwrite and config_file.exists():
            shutil.rmtree(self.folder)
        if saved.exists() and any(saved.iterdir()):
            if not self.config.checkpoint.resume:
                raise UserError(
                    f"{self.folder} holds a run and checkpoint.resume is false; choose another output, or overwrite=true"
                )
            refuse_other_config(yaml.safe_load(config_file.read_text()), self.config)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            config_file.write_text(to_yaml(self.config), encoding="utf-8")
        except OSError as error:
            raise UserError(f"output={self.folder}: cannot be written ({error.strerror}); choose another") from None

    def _resume(self) -> int:
        if self.checkpoints.latest is None:
            return 0
        with self.display.stage(f"resume from step {self.checkpoints.latest}"):
            state, meta = self.checkpoints.restore(self.step.state)
            self.step.restore(state)
            self.stream.restore(meta["position"])
        self.position = meta["position"]
        self.result.evaluations = {int(step): values for step, values in meta["evaluations"].items()}
        return int(state["step"])

    def _loop(self, done: int) -> None:
        config, display = self.config, self.display
        schedule = make_schedule(config.train, self.steps)
        self.position = getattr(self, "position", None) or self.stream.state()
        if done < self.steps:
            with display.stage("compile"):
                pending = self._dispatch()
        seconds: dict[str, float] = defaultdict(float)
        tokens, since = 0.0, time.perf_counter()
        waited_on_compile = done
        for number in range(done + 1, self.steps + 1):
            batch, values = pending
            position = batch.host.state
            # The next step is dispatched before this one is looked at, so that looking never makes the device wait.
            evaluate = config.train.eval_every and number % config.train.eval_every == 0 and number < self.steps
            save = config.checkpoint.save_every and number % config.checkpoint.save_every == 0
            ahead = number < self.steps and not evaluate and not save
            if ahead:
                pending = self._dispatch()
            values = {name: float(value) for name, value in jax.device_get(values).items()}
            if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
                raise UserError(
                    f"step {number}: loss {values['loss']}, gradient norm {values['grad_norm']}; lower "
                    f"train.learning_rate, or go on from the last checkpoint (step {self.checkpoints.latest})"
                )
            self.position, self.result.steps = position, number
            for name, value in batch.seconds.items():
                seconds[name] += value
            tokens += batch.host.tokens
            display.advance(number)
            if number % config.log.every == 0 or number == self.steps:
                now = time.perf_counter()
                steps = number - waited_on_compile
                values |= {"learning_rate": float(schedule(number - 1)), "tokens_per_second": tokens / (now - since)}
                values |= {f"seconds/{name}": value / steps for name, value in seconds.items()}
                values["seconds/step"] = (now - since) / steps
                self.metrics.write(number, values)
                display.line(_progress_line(number, self.steps, values))
                seconds, tokens, since, waited_on_compile = defaultdict(float), 0.0, now, number
            if evaluate:
                paused = time.perf_counter()
                if self._evaluate(number):
                    display.line(f"no better held-out loss in {config.train.patience} evaluations: stopping")
                    return
                since += time.perf_counter() - paused
            if save:
                self._save(number)
            if not ahead and number < self.steps:
                pending = self._dispatch()

    def _dispatch(self) -> tuple[Any, dict[str, jax.Array]]:
        batch = next(self.stream)
        return batch, self.step(batch)

    def _evaluate(self, step: int) -> bool:
        """Held-out numbers of the weights as they are; True when patience has run out."""
        if not self.held_out:
            return False
        values = self.evaluate(self.step.state["params"]["student"], self.held_out)
        self.result.evaluations[step] = values
        self.metrics.write(step, {f"eval/{name}": value for name, value in values.items()})
        self.display.line(f"held-out at step {step}: " + "  ".join(f"{n} {v:.4f}" for n, v in values.items()))
        if self.config.train.keep_best and (self.best is None or values["ce"] < self.best[0]):
            self.best = values["ce"], step, jax.device_get(self.step.state["params"]["student"])
        patience = self.config.train.patience
        order = sorted(self.result.evaluations)
        best = min(order, key=lambda s: self.result.evaluations[s]["ce"])
        return patience is not None and len(order) - 1 - order.index(best) >= patience

    def _save(self, step: int) -> None:
        meta = {"position": self.position, "evaluations": {str(s): v for s, v in self.result.evaluations.items()}}
        self.checkpoints.save(step, self.step.state, meta)

    def _finish(self) -> None:
        config, result, display = self.config, self.result, self.display
        self._save(result.steps)
        if result.steps not in result.evaluations:
            self._evaluate(result.steps)
        result.kept_step = result.steps
        if self.best is not None and self.best[1] != result.steps:
            result.kept_step = self.best[1]
            nnx.update(self.model, self.best[2])
            display.line(f"keeping step {result.kept_step}, the best held-out loss")
        with display.stage("export"):
            export_hf(
                self.model, result.export, source=config.student.path or config.teacher.path,
                tokenizer=config.data.tokenizer or config.teacher.path or config.student.path,
                dtype=config.student.export_dtype,
            )
            self.checkpoints.wait()
        with display.stage("check the export (transformers)"):
            gap, reply = check_export(self.stream, self.model, result.export, config.log)
        display.line(f"exported to {result.export}: transformers' log-probabilities differ by at most {gap:.1e}")
        if result.evaluations:
            _show_evaluations(display, result)
        if reply is not None:
            display.line(f"\nQ: {config.log.sample_prompt}\nA: {reply}")


def _progress_line(step: int, steps: int, values: dict[str, float]) -> str:
    parts = [f"step {step}/{steps}", f"loss {values['loss']:.4f}"]
    parts += [f"{name} {values[name]:.4f}" for name in ("kd", "ce") if name in values]
    parts += [f"lr {values['learning_rate']:.1e}", f"{values['tokens_per_second']:,.0f} tok/s"]
    shown = {n.removeprefix("seconds/"): v for n, v in values.items() if n.startswith("seconds/")}
    parts.append(" ".join(f"{name} {value:.2f}s" for name, value in shown.items()))
    return "  ".join(parts)


def _show_evaluations(display: Display, result: Result) -> None:
    steps = sorted({0, result.kept_step, result.steps} & set(result.evaluations))
    names = list(result.evaluations[steps[-1]])
    display.table(
        "held-out rows", ["", *(f"step {s}" for s in steps)],
        [[name, *(f"{result.evaluations[s][name]:.4f}" for s in steps)] for name in names],
    )
