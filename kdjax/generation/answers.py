"""An engine answers prompts. Being killed costs at most the batch in hand: an answered batch is a line on disk.

``python -m kdjax.generate`` makes a data set of the answers, ``python -m kdjax.evaluate --task`` scores them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from jaxtyping import Int32
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bridge.checkpoint import read_facts
from bridge.client import RemoteEngine
from bridge.engine import Completion, Sampling
from kdjax.config import Config, SourceConfig
from kdjax.data.formats import RowError
from kdjax.data.prompts import Prompt, Prompts, response_text
from kdjax.data.vocabulary import load_tokenizer, valid_ids
from kdjax.engines import Revived, engine_device, engine_dtype, engine_options, started
from kdjax.errors import UserError
from kdjax.folders import resolve
from kdjax.generation.journal import Journal
from kdjax.generation.rewards import find_reward, score
from kdjax.interrupt import Interrupt, Interrupted
from kdjax.models import teacher_shape
from kdjax.progress import Display

SECONDS_BETWEEN_LINES = 20
MARGIN = 8  # positions that SGLang keeps to itself
# Keys of ``generate`` that the answers depend on; temperature and the limit of prompts have values that are found out.
ASKED = ("max_new_tokens", "top_p", "top_k", "samples", "seed", "batch_size")
LEFT_OUT = {"bad": "malformed", "long": "longer than generate.prompt_max_len"}


@dataclass(frozen=True)
class Answer:
    """One sampled answer: its text without the end token, its tokens with it, and its reward if one was asked for."""

    text: str
    tokens: int
    finish_reason: str
    reward: float | None = None


Entry = list[Answer] | str
"""The answers to one prompt, or the key in LEFT_OUT for why it was not asked."""


class Answers:
    """The prompts of ``sources`` answered by ``model``, as far as ``journal`` has them; ``write`` has the rest written.

    Args:
        model: a Hugging Face folder or hub id; its own tokenizer and chat template are used.
        temperature: where ``generate.temperature`` is not set.
        reward: name of a reward that every answer gets, or None.
        as_teacher: where a row has a prompt of the teacher's own, ask that one.
        replace: start anew over answers of other settings, which are refused otherwise; ``overwrite`` always does.

    Iterating gives ``(prompt, answers)`` in the order of the rows; for a prompt that was left out ``(None, why)``.
    Raises UserError where prompts, model or journal do not fit.
    """

    def __init__(
        self,
        config: Config,
        model: str,
        sources: Sequence[SourceConfig],
        journal: Path,
        *,
        temperature: float,
        reward: str | None,
        as_teacher: bool,
        replace: bool,
    ):
        self.config, settings = config, config.generate
        self._reward = None if reward is None else find_reward(reward)
        self._is_teacher, self._as_teacher = model == config.teacher.path, as_teacher
        self.folder = resolve(model).resolve()
        if not (self.folder / "config.json").is_file():
            raise UserError(f"{model}: no model in this folder (config.json is missing)")
        self.tokenizer = load_tokenizer(self.folder)
        self.prompts = Prompts(sources, config.data, self.tokenizer)
        self._limit = _prompt_limit(config, self.folder)
        try:
            facts = read_facts(self.folder)
        except ValueError as error:
            raise UserError(f"{model}: {error}") from None
        end = self.tokenizer.eos_token_id
        self.sampling = Sampling(
            max_new_tokens=settings.max_new_tokens,
            temperature=temperature if settings.temperature is None else settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            stop_ids=() if end is None else (end,),
            banned_ids=tuple(np.flatnonzero(~valid_ids(self.tokenizer, facts.vocab)).tolist()),
            seed=settings.seed,
            n=settings.samples,
        )
        self._ends = facts.eos_ids | set(self.sampling.stop_ids)
        asked = {key: getattr(settings, key) for key in ASKED}
        asked |= {"temperature": self.sampling.temperature, "prompt_max_len": self._limit}
        written_under = {
            "model": fingerprint(self.folder),
            **{f"generate.{key}": value for key, value in asked.items()},
            **{f"source {i}: {key}": x for i, source in enumerate(sources) for key, x in asdict(source).items()},
            "rows": len(self.prompts),
            "reward": None if reward is None else [reward, _file_digest(reward)],
        }
        self.journal = Journal(journal, written_under, replace=replace, fresh=config.overwrite)
        self.seconds, self.tokens = 0.0, 0

    @property
    def complete(self) -> bool:
        return self.journal.lines * self.config.generate.batch_size >= len(self.prompts)

    def write(self, display: Display, log: Path) -> None:
        """Have an engine answer what is not answered yet, batch by batch; ``log`` takes what the engine prints.

        A signal to stop ends it, behind a batch that is in hand, with a UserError; the same command then goes on.
        """
        if self.complete:
            return
        with self._engine(log) as engine, Interrupt(display.line, lambda: engine.kill()) as interrupt:
            restarts = self.config.teacher.restarts
            whose = "teacher" if self._is_teacher else "model"
            revived = Revived(engine, restarts, display.line, whose=whose, limit="generate.prompt_max_len")
            try:
                with display.stage(f"engine ({self.config.teacher.engine})"), interrupt.breakable():
                    engine.wait_ready()
                with _Progress(display, len(self.prompts), self._done) as progress:
                    while not self.complete:
                        interrupt.leave()
                        self._write_batch(revived, progress)
            except Interrupted as signal:
                raise UserError(
                    f"{signal}: {self._done} of {len(self.prompts)} prompts are answered; "
                    f"run the same command again to go on"
                ) from None
        self.seconds, self.tokens = progress.seconds, progress.tokens

    def __iter__(self) -> Iterator[tuple[Prompt | None, Entry]]:
        for number, line in enumerate(self.journal):
            batch = self._batch(number)
            if line["prompts"] != self._digest(batch):
                first = self.prompts.where(number * self.config.generate.batch_size)
                raise UserError(
                    f"{self.journal.path}: the prompts from {first} on have changed since they were answered; put them "
                    f"back, or start anew with overwrite=true"
                )
            for prompt, entry in zip(batch, line["answers"], strict=True):
                if isinstance(prompt, str):
                    yield None, prompt
                else:
                    yield prompt, [Answer(**answer) for answer in entry]

    def close(self) -> None:
        self.journal.close()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def _done(self) -> int:
        return min(self.journal.lines * self.config.generate.batch_size, len(self.prompts))

    def _batch(self, number: int) -> list[Prompt | str]:
        size = self.config.generate.batch_size
        return [self._prompt(i) for i in range(number * size, min((number + 1) * size, len(self.prompts)))]

    def _prompt(self, index: int) -> Prompt | str:
        try:
            prompt = self.prompts[index]
        except RowError as error:
            if self.config.data.on_bad_row == "stop":
                where = self.prompts.where(index)
                raise UserError(f"{where}: {error}; mend the row, or set data.on_bad_row: skip") from None
            return "bad"
        return prompt if self._limit is None or len(self._ids(prompt)) <= self._limit else "long"

    def _digest(self, batch: Sequence[Prompt | str]) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for prompt in batch:
            digest.update(prompt.encode() if isinstance(prompt, str) else self._ids(prompt).tobytes())
            digest.update(b"\0")
        return digest.hexdigest()

    def _ids(self, prompt: Prompt) -> Int32[np.ndarray, " T"]:
        """What is asked."""
        return prompt.teacher_ids if self._as_teacher and prompt.teacher_ids is not None else prompt.ids

    def _engine(self, log: Path) -> RemoteEngine:
        """The engine that ``teacher`` describes, with this model in it."""
        teacher, device = self.config.teacher, engine_device()
        return started(
            self.folder,
            "model",
            kind=teacher.engine,
            log=log,
            dtype=engine_dtype(teacher.dtype, device),
            device=device,
            seed=self.sampling.seed,
            mem_fraction=teacher.mem_fraction if self._is_teacher else None,
            threads=teacher.threads,
            options=engine_options(teacher) if self._is_teacher else {},
            start_timeout=teacher.start_timeout,
            call_timeout=self.config.generate.timeout,
        )

    def _write_batch(self, engine: Revived, progress: _Progress) -> None:
        number = self.journal.lines
        batch = self._batch(number)
        asked = [prompt for prompt in batch if not isinstance(prompt, str)]
        completions = iter(self._complete(engine, asked, number) if asked else ())
        entries: list[Entry] = []
        for prompt in batch:
            if isinstance(prompt, str):
                entries.append(prompt)
            else:
                entries.append([self._answer(prompt, next(completions)) for _ in range(self.sampling.n)])
        plain = [entry if isinstance(entry, str) else [asdict(answer) for answer in entry] for entry in entries]
        self.journal.append({"prompts": self._digest(batch), "answers": plain})
        progress.add(entries)

    def _complete(self, engine: Revived, asked: list[Prompt], number: int) -> list[Completion]:
        seed = int(np.random.SeedSequence([self.sampling.seed, number]).generate_state(1)[0])
        sampling = replace(self.sampling, seed=seed)
        return engine.ask(lambda engine: engine.generate([self._ids(prompt) for prompt in asked], sampling))

    def _answer(self, prompt: Prompt, completion: Completion) -> Answer:
        text = response_text(self.tokenizer, completion.ids, self._ends)
        reward = None if self._reward is None else score(self._reward, prompt, text)
        return Answer(text, len(completion.ids), completion.finish_reason, reward)


def fingerprint(folder: Path) -> str:
    """A digest that changes when a model's configuration, tokenizer or weights do: of the weights it reads samples."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            for at in range(0, size, max(4096, size // 64)):
                content.seek(at)
                digest.update(content.read(4096))
    return digest.hexdigest()


def _file_digest(reward: str) -> str | None:
    """Of the file that a reward is written in, if it is a user's own: changed, it may score otherwise."""
    file = Path(reward.rpartition(":")[0])
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() if file.suffix == ".py" else None


def _prompt_limit(config: Config, folder: Path) -> int | None:
    """Tokens that a prompt may have: as configured, else what the model's positions leave beside the answer."""
    if config.generate.prompt_max_len is not None:
        return config.generate.prompt_max_len
    positions = teacher_shape(folder).max_position_embeddings
    if positions is None:
        return None
    limit = positions - config.generate.max_new_tokens - MARGIN
    if limit < 1:
        raise UserError(
            f"generate.max_new_tokens={config.generate.max_new_tokens} leaves no room for a prompt in the "
            f"{positions} positions of {folder}; lower it"
        )
    return limit


class _Progress:
    """What a person sees of it: a bar with rates in a terminal, elsewhere a line now and then."""

    def __init__(self, display: Display, total: int, done: int) -> None:
        self._display, self._total, self._done = display, total, done
        self._answers = self._ended = self.tokens = 0
        self._rewards: list[float] = []
        self._bar = None
        self._start = self._shown = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def add(self, entries: list[Entry]) -> None:
        answers = [answer for entry in entries if not isinstance(entry, str) for answer in entry]
        self._done += len(entries)
        self._answers += len(answers)
        self.tokens += sum(answer.tokens for answer in answers)
        self._ended += sum(answer.finish_reason == "stop" for answer in answers)
        self._rewards += [answer.reward for answer in answers if answer.reward is not None]
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=self._words())
        elif self._done == self._total or time.perf_counter() - self._shown > SECONDS_BETWEEN_LINES:
            self._shown = time.perf_counter()
            self._display.line(f"{self._done}/{self._total} prompts  {self._words()}")

    def _words(self) -> str:
        seconds, answers = self.seconds, max(1, self._answers)
        words = f"{self.tokens / seconds:,.0f} tok/s  {self._answers / seconds:.1f} answers/s"
        words += f"  ended {self._ended / answers:.0%}"
        return words + (f"  reward {mean(self._rewards):.3f}" if self._rewards else "")

    def __enter__(self) -> _Progress:
        if self._display.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._display.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, completed=self._done)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
