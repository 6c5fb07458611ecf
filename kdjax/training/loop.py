"""The one training loop: take a batch, step, now and then look, save and evaluate; at the end export and prove it.

Off-policy, on-policy and self-distillation and supervised fine-tuning differ in the stream that ``config`` describes;
the loop only asks more of a step whose batch the student wrote.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from bridge.errors import EngineError
from kdjax.algorithms import check_names, make_algorithm
from kdjax.config import Config
from kdjax.errors import UserError
from kdjax.interrupt import Interrupt, Interrupted
from kdjax.models import load_model
from kdjax.progress import Display
from kdjax.training.about import machine, note, now
from kdjax.training.best import BEST, Best, read_best, write_best
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.compiled import keep_compiled
from kdjax.training.device_batch import DeviceBatch
from kdjax.training.evaluation import Evaluation, Evaluator, call_evaluations, check_evaluations
from kdjax.training.folder import RunFolder
from kdjax.training.metrics import Metrics, check_log
from kdjax.training.optimizer import make_optimizer
from kdjax.training.preflight import check_export, check_student, check_teacher
from kdjax.training.profile import Profiler, doing
from kdjax.training.refusals import Refusal, refuse_nonsense, refuse_silence, refuse_strangers, what_costs
from kdjax.training.sources import Stream
from kdjax.training.step import make_step
from kdjax.training.student import export_student, make_student
from kdjax.training.templates import check_templates
from kdjax.training.window import Window

TEACHER = "teacher"  # the name of a self-teacher among what is saved


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

    Raises UserError for what the configuration or the data can mend, EngineError where an engine fails for good.
    """
    return _Run(config, display or Display()).run()


class _Run:
    def __init__(self, config: Config, display: Display) -> None:
        self.config, self.display = config, display
        self.folder = Path(config.output)
        self.result = Result(0, self.folder / "export")
        self.position: dict[str, Any] = {}
        self.stream: Stream | None = None
        self.fault: EngineError | UserError | None = None
        self.best: Best | None = None  # with train.keep_best
        self.begun = False  # whether a step was taken in this life
        self.finished = False

    def run(self) -> Result:
        check_names(self.config)
        check_evaluations(self.config.train.eval_functions)
        check_log(self.config.log)
        keep_compiled(self.config.train.compilation_cache, self.display.line)
        for line in what_costs(self.config):
            self.display.line(line)
        with Interrupt(self.display.line, self._leave_at_once) as self.interrupt:
            try:
                with ExitStack() as self.opened:
                    self._whole()
                if self.config.log.report:
                    with self.interrupt.breakable():
                        self._report()
            except Interrupted as signal:
                raise self.fault or UserError(f"{signal}: {self._left()}") from None
        if self.fault is not None:
            raise self.fault
        return self.result

    def _whole(self) -> None:
        """Everything between opening and closing; only the steps and their save are not broken off by a signal."""
        with self.interrupt.breakable():
            start = self._start()
        traced = (self.folder / "profile", self.config.log.profile, start, self.steps, self.display.line)
        with self.display.bar(self.steps, start), Profiler(*traced) as self.profiler:
            self._loop(start)
        if self.stream.self_teacher is not None:
            self.stream.self_teacher.learn()  # from the last step too
        self._save(self.result.steps)
        with self.interrupt.breakable():
            self._finish()

    def _start(self) -> int:
        """All up to the first step; returns the number of steps that an earlier life of this run has done."""
        config, display = self.config, self.display
        self.run_folder = self.opened.enter_context(RunFolder(config))
        self.stream = self.opened.enter_context(self._open_stream())
        self.checkpoints = self.opened.enter_context(Checkpoints(self.folder / "checkpoints", config.checkpoint))
        self.steps = config.train.steps or self.stream.data.estimate_batches(config.train.epochs)
        self.stream.steps = self.steps
        held_out = self.stream.held_out()  # read now: the teacher is still starting, and faults are known early
        with display.stage("student"):
            self.model = make_student(config, self.stream.mesh)
            algorithm = make_algorithm(config, self.model, self.stream.teachers, seed=config.train.seed)
            optimizer = make_optimizer(config.train, self.steps)
            self.step = make_step(self.model, algorithm, optimizer, self.stream.mesh, config.train.offload)
        if config.teacher.path is None:
            self.stream.attach(self.step)
        else:
            # Engines that must start one after the other wait for the teacher as they are attached.
            with display.stage(f"teacher ({config.teacher.engine})"):
                self.stream.attach(self.step)
                self.stream.wait_ready()
            if config.teacher.preflight:
                with display.stage("preflight"):
                    check_teacher(self.stream)
                for line in check_templates(self.stream):
                    display.line(line)
        start = self._resume()
        with display.stage("held-out rows"):
            self.held_out = self.stream.evaluation(held_out)
        if self.stream.students is not None:
            with display.stage(f"rollouts ({config.rollout.engine})"):
                for line in check_student(self.stream, self.step):
                    display.line(line)
        self.evaluate = Evaluator(self.model, self.stream.teachers, self.stream.mesh)
        self.metrics = self.opened.enter_context(Metrics(self.folder, config, start))
        self._describe(start)
        if start == 0:
            self._evaluate(0)
        return start

    def _open_stream(self) -> Stream:
        with self.display.stage("tokenizer and data"):
            return Stream(self.config, log=self.folder / "engine.log", tell=self.display.line)

    def _describe(self, start: int) -> None:
        size = sum(x.size for x in jax.tree.leaves(nnx.state(self.model, nnx.Param)))
        note(self.folder, steps=self.steps, parameters=size, resumed_at=start or None, finished=None, **machine())
        if start == 0:
            note(self.folder, started=now())

    def _resume(self) -> int:
        if self.checkpoints.latest is None:
            return 0
        with self.display.stage(f"resume from step {self.checkpoints.latest}"):
            state, meta = self.checkpoints.restore(self._state(), self.display.line)
            teacher = state.pop(TEACHER, None)
            self.step.restore(state)
            if teacher is not None:
                self.stream.self_teacher.restore(teacher)
            self.stream.restore(meta["position"])
            self.position = meta["position"]
        self.result.steps = int(state["step"])
        self.result.evaluations = {int(step): values for step, values in meta["evaluations"].items()}
        if self.config.train.keep_best:
            self.best = read_best(self.folder)
            if self.best is None:
                self.display.line(f"warning: {self.folder / BEST} is gone; the best is looked for from here on")
        return self.result.steps

    def _loop(self, done: int) -> None:
        config, display = self.config, self.display
        if done == self.steps or self._out_of_patience():
            return
        with display.stage("compile"):
            pending = self._dispatch()
        if pending is None:
            raise self.fault or Interrupted(self.interrupt.asked)
        self.metrics.write(done, display.spent())
        window = Window(config, self.steps, done)

        def ahead() -> tuple[DeviceBatch, dict[str, jax.Array]] | None:
            taken = self._dispatch()
            if taken is not None:
                window.took(taken[0])
            return taken

        for number in range(done + 1, self.steps + 1):
            batch, values = pending
            last = number == self.steps
            evaluate = not last and _due(number, config.train.eval_every)
            save = _due(number, config.checkpoint.save_every)
            # The next step is dispatched before this one is looked at, so that looking never makes the device wait;
            # not where the state of this very step is still needed.
            pending = None if last or evaluate or save else ahead()
            with doing("wait for the step"):
                values = {name: float(value) for name, value in jax.device_get(values).items()}
            self.profiler.done(number)
            try:
                refuse_nonsense(values, self.step, batch)
                self.run_folder.keep()
                values = _without_absent(values, batch)
                refuse_strangers(values, config.rollout)
            except Refusal as refusal:
                self.stream.close_refusing(number)
                raise UserError(f"step {number}: {refusal.what}; {self.checkpoints.newest()}; {refusal.mend}") from None
            values |= batch.host.report
            for line in batch.host.notes:
                display.line(line)
            self.position, self.result.steps = batch.host.state, number
            display.advance(number, values["loss"])
            window.done(batch)
            if last or _due(number, config.log.every):
                values |= window.close(number) | self.stream.gauges()
                self.metrics.write(number, values)
                display.step(number, self.steps, values)
            elif of_rollouts := {name: value for name, value in values.items() if name.startswith("rollout/")}:
                self.metrics.write(number, of_rollouts)
            with window.paused():
                if evaluate and self._evaluate(number):
                    display.line(f"no better held-out loss in {config.train.patience} evaluations: stopping")
                    return
                if save:
                    self._save(number)
            if pending is None and not last:
                pending = ahead()
                if pending is None:
                    self._save(number)
                    if self.fault is None:
                        raise Interrupted(self.interrupt.asked)
                    self.checkpoints.wait()
                    if isinstance(self.fault, EngineError):
                        raise EngineError(f"{self.fault}\n{self._left()}")
                    raise UserError(f"{self.fault}: {self._left()}")

    def _dispatch(self) -> tuple[DeviceBatch, dict[str, jax.Array]] | None:
        """Take a batch and start its step; None where the run was asked to stop, or for a ``fault``."""
        try:
            over = self.interrupt.asked or self.fault
            with doing("wait for a batch"):
                batch = None if over else self.stream.take(lambda: self.interrupt.asked)
        except (EngineError, UserError) as error:
            self.fault, batch = error, None  # what was learnt up to here is saved first
        if batch is None:
            return None
        if self.stream.students is not None and not self.begun:
            refuse_silence(self.step, batch, self.config.distill.algorithm)
        self.begun = True
        with self.profiler.step(self.step.number + 1):
            return batch, self.step(batch)

    def _left(self) -> str:
        """What there is of a run that ends early, and what to do about it."""
        if self.finished:
            return f"the run is finished, its report is not; python -m kdjax.report {self.folder} writes it"
        if self.result.steps == 0:
            return "nothing new to save; run the same command again"
        return f"saved step {self.result.steps}; run the same command again to go on"

    def _leave_at_once(self) -> None:
        if self.stream is not None:
            self.stream.kill()
        self.display.line("leaving at once; the same command goes on from the newest checkpoint")
        self.display.console.show_cursor()

    def _evaluate(self, step: int) -> bool:
        """Held-out numbers of the weights as they are; True when patience has run out."""
        if not self.held_out:
            return False
        with self.display.timed("evaluation"):
            values = self.evaluate(self.step.state["params"]["student"], self.held_out)
            about = (self.model, self.held_out, self.stream.teachers, self.stream.tokenizer, self.stream.mesh)
            own = Evaluation(*about, self.config, step, values)
            values |= call_evaluations(self.config.train.eval_functions, own)
        self._record(step, values)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if not name.startswith("kl_at/"))
        self.display.line(f"held-out at step {step}: {shown}")
        if self.config.train.keep_best and (self.best is None or values["ce"] < self.best.values["ce"]):
            self.best = Best(step, values)
            write_best(self.folder, self.model, self.config, self.best)
        return self._out_of_patience()

    def _record(self, step: int, values: dict[str, float]) -> None:
        self.result.evaluations[step] = values
        self.metrics.write(step, {f"eval/{name}": value for name, value in values.items()} | self.display.spent())

    def _out_of_patience(self) -> bool:
        steps, patience = sorted(self.result.evaluations), self.config.train.patience
        return patience is not None and len(steps) - 1 - steps.index(self._best_step()) >= patience

    def _best_step(self) -> int:
        return min(self.result.evaluations, key=lambda step: self.result.evaluations[step]["ce"])

    def _save(self, step: int) -> None:
        meta = {"position": self.position, "evaluations": {str(s): v for s, v in self.result.evaluations.items()}}
        self.checkpoints.save(step, self._state(), meta)

    def _state(self) -> dict[str, Any]:
        """Everything with arrays that a run is made of."""
        state, teacher = self.step.whole_state(), self.stream.self_teacher
        return state if teacher is None else state | {TEACHER: teacher.state}

    def _finish(self) -> None:
        config, result, display = self.config, self.result, self.display
        if result.steps not in result.evaluations:
            self._evaluate(result.steps)
        result.kept_step = result.steps if self.best is None else self.best.step
        if result.kept_step != result.steps:
            if result.kept_step not in result.evaluations:  # of a life that no checkpoint remembers
                self._record(*self.best)
            best = load_model(self.folder / BEST, self.stream.mesh, param_dtype=config.student.param_dtype)
            nnx.update(self.model, nnx.state(best))
            display.line(f"keeping step {result.kept_step}, the best held-out loss")
        with display.stage("export"):
            export_student(self.model, config, result.export)
            if config.checkpoint.export_teacher:
                export_student(self.stream.self_teacher.model, config, self.folder / "export_teacher")
            self.checkpoints.wait()
        self.run_folder.keep()
        if result.evaluations:
            _show_evaluations(display, result)
        display.line(f"exported to {result.export}")
        if config.checkpoint.check_export:
            with display.stage("check the export (transformers)"):
                checked = check_export(self.stream, self.model, result.export)
            self.fault = checked.fault  # told at the very end: the run is whole, and so is what it wrote
            note(self.folder, export_gap=checked.gap, samples=[asdict(sample) for sample in checked.samples])
            display.line(f"transformers' log-probabilities differ from the student's by at most {checked.gap:.1e}")
            for sample in checked.samples:
                display.line(f"\nQ: {sample.question}\nA: {sample.answer}")
        note(self.folder, finished=now(), kept_step=result.kept_step)
        self.metrics.write(result.steps, display.spent())
        evaluations = {str(step): values for step, values in sorted(result.evaluations.items())}
        self.run_folder.finish({"steps": result.steps, "kept_step": result.kept_step, "evaluations": evaluations})
        self.finished = True

    def _report(self) -> None:
        from kdjax.reporting import write_report  # plots load for seconds, and only where they are wanted

        with self.display.stage("report"):
            page = write_report(self.folder)
        self.display.line(f"report: {page}")


def _without_absent(values: dict[str, float], batch: DeviceBatch) -> dict[str, float]:
    """What a step tells, less the terms of rows that it had none of: of rollouts or of the data. They would read 0."""
    host = batch.host.batch
    if "on_policy" not in host.extras:
        return values
    sampled = host.extras["on_policy"][host.mask] != 0
    absent = set() if sampled.any() else {name for name in values if name.startswith("rollout/")}
    absent |= {"ce"} if sampled.all() else set()
    return {name: value for name, value in values.items() if name not in absent}


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _show_evaluations(display: Display, result: Result, columns: int = 7) -> None:
    """Before, during and after, side by side; of many evaluations an even choice, with the kept one."""
    known = sorted(result.evaluations)
    stride = max(1, -(-(len(known) - 1) // (columns - 1)))
    steps = sorted({*known[::stride], known[-1], result.kept_step} & set(known))
    names = [name for name in result.evaluations[steps[-1]] if not name.startswith("kl_at/")]
    display.table(
        "held-out rows",
        ["", *(f"step {s}" for s in steps)],
        [[name, *(f"{result.evaluations[s][name]:.4f}" for s in steps)] for name in names],
    )
