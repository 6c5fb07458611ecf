"""Batches of what the student itself writes: prompts of the data, the engines' responses, packed like any other batch.

The stream has DataStream's manners, so a run with rollouts differs from one with data in nothing else. What was sampled
is what is trained on: token ids come out of the engine and are never rendered or tokenized again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.config import Config
from kdjax.config.identity import identity
from kdjax.data import (
    BatchSource,
    Document,
    EndlessPrompts,
    Fault,
    HostBatch,
    Placed,
    Prompt,
    Statistics,
    collate,
    response_text,
)
from kdjax.data.packing import pack
from kdjax.errors import UserError
from kdjax.generation.rewards import find_reward, score
from kdjax.rollouts.engines import StudentEngines
from kdjax.rollouts.log import Rollout, RolloutLog, describe, is_empty, sample_text, shown
from kdjax.rollouts.overlap import Waits
from kdjax.rollouts.responses import advantages_of, rollout_document


@dataclass(frozen=True)
class Asked:
    """A prompt's place in a step: its number in the run, and the batch rows kept for its documents.

    ``sampled`` says whether the student answers it; otherwise the data's own response is trained on.
    """

    number: int
    prompt: Prompt
    sampled: bool
    rows: tuple[int, ...]


class RolloutStream(BatchSource):
    """An iterator of HostBatches of responses; with ``distill.on_policy_fraction`` < 1, of the data's own among them.

    A step takes prompts in order for as long as all their responses are sure to fit its rows. Which prompts, which of
    them are sampled, and the seed of every response depend on data, configuration and seed alone. ``engines`` must be
    set before the first batch is taken, and whoever takes batches tells ``waits`` when it has to wait for one.
    Arguments and errors otherwise as DataStream's.
    """

    templated = True  # as every prompt is

    def __init__(
        self, config: Config, tokenizer: Any, *, batch: int, accumulate: int, shards: int, vocab_size: int | None
    ) -> None:
        self.waits = Waits()
        self._config, self._rollout, self._tokenizer = config, config.rollout, tokenizer
        self._seq_len = config.data.max_len
        self._shape = {"batch": batch, "accumulate": accumulate, "shards": shards}
        mixed = config.distill.on_policy_fraction < 1
        seed = config.train.seed
        self._prompts = EndlessPrompts(config.data, tokenizer, seed=seed, vocab_size=vocab_size, documents=mixed)
        super().__init__(config.data, seed, self._prompts.sizes)
        self._reward = None if config.rollout.reward is None else find_reward(config.rollout.reward)
        self._extras = ("on_policy", "behaviour_logprobs") + (("advantage",) if self._reward else ())
        self._log = RolloutLog(Path(config.output) / "rollouts", identity(config))
        self._written: dict[int, tuple[list[Rollout], dict[Document, Rollout]]] = {}
        self._next = self._number = 0
        self._loss_sizes: set[int] = set()
        self.engines: StudentEngines | None = None

    def __next__(self) -> HostBatch:
        done, number = self._number, self._number + 1
        left_out = self._left_out()
        asked = self._ask(first=self._number == 0)
        rollouts, seconds = self._log.read(number), {}
        # For responses that stand on the disk already too: an engine that is teacher and student in turn must not be
        # given the student's weights while it is the teacher.
        self.engines.wait_for(done - self._rollout.max_staleness)
        if rollouts is None:
            start, waited = time.perf_counter(), self.waits.seconds()
            rollouts = self._draw(asked)
            whole, waited = time.perf_counter() - start, self.waits.seconds() - waited
            seconds = {"generate": whole, "hidden": max(0.0, whole - waited)}
            self._log.write(number, rollouts)
        rows = self._place(number, asked, rollouts)
        shape = self._shape | {"accumulate": self._micro_batches(len(rows))}
        shape |= {"known": self._loss_sizes, "packed": self._config.data.packing}
        host = collate(rows, seq_len=self._seq_len, extras=self._extras, **shape)
        self._loss_sizes.add(host.batch.rows.shape[-1])
        self._number = number
        self._count(host, rollouts)
        return replace(
            host,
            state=self.state(),
            report=(describe(rollouts, done) if rollouts else {}) | self._left_out(),
            seconds=seconds,
            notes=(*self._first_left_out(number, left_out), *self._notes(number, asked, rollouts)),
        )

    def learned(self, host: HostBatch, log_ratio: np.ndarray | None) -> None:
        """Add to the step's file what the step found: log q − log p of each loss row, [A, G·N]; None: it tells none."""
        rollouts, of = self._written.pop(host.state["number"], ([], {}))
        if log_ratio is None:
            return
        by_shard = log_ratio.reshape(*host.batch.rows.shape)
        for placed in host.documents:
            if (rollout := of.get(placed.document)) is not None:
                rollout.kl = float(_rows(placed, by_shard).mean())
        if rollouts:
            self._log.write(host.state["number"], rollouts)

    def set_aside(self, number: int) -> None:
        """What was written for step ``number`` and later ones is drawn anew when the run goes on."""
        self._written.clear()
        self._log.set_aside(number)

    def state(self) -> dict[str, Any]:
        """The position after the last batch: plain numbers, ready for JSON."""
        return self._identity() | {
            "next_prompt": self._next,
            "number": self._number,
            "loss_sizes": sorted(self._loss_sizes),
            "statistics": asdict(self.statistics),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. Raises UserError when the data or the seed are not the same."""
        self._refuse_others(state)
        self._next, self._number = state["next_prompt"], state["number"]
        self._loss_sizes = set(state["loss_sizes"])
        self.statistics = Statistics(**state["statistics"])

    def estimate_batches(self, epochs: float = 1.0, sample: int = 4) -> int:
        """How many steps ``epochs`` passes over the prompts make, judged by the first few."""
        saved = self.state()
        for number in range(sample):
            self._ask(first=number == self._number == 0)
        taken = self._next - saved["next_prompt"]
        self.restore(saved)
        return max(1, round(epochs * self.rows_per_epoch * sample / taken))

    def sample(self, count: int) -> list[Document]:
        """The first ``count`` usable prompts as documents of two tokens or more, to compare two engines on."""
        first = (self._prompts[i] for i in range(self.rows_per_epoch))
        usable = (prompt for prompt in first if isinstance(prompt, Prompt) and len(prompt.ids) > 1)
        chosen = itertools.islice(usable, count)
        return [Document(prompt.ids, np.arange(len(prompt.ids)) > 0, prompt.source) for prompt in chosen]

    def close(self) -> None:
        """Stop the engines."""
        if self.engines is not None:
            self.engines.close()

    def _ask(self, first: bool = False) -> list[Asked]:
        """The next step's prompts, each with room for the longest responses there can be.

        The first step must have room for all that are wanted; a later one of long prompts takes the fewer that fit.
        """
        room = self._room()
        asked: list[Asked] = []
        unusable = 0
        while len(asked) != self._rollout.prompts:
            prompt = self._prompts[self._next]
            self.statistics.rows += 1
            lengths = self._lengths(prompt)
            if lengths:
                rows = _reserve(room, lengths, whole=not self._config.data.packing)
                if rows is None:
                    self.statistics.rows -= 1  # it comes again
                    break
                asked.append(Asked(self._next, prompt, self._sampled(prompt), rows))
                unusable = 0
            else:
                unusable += 1
                if unusable >= self.rows_per_epoch:
                    raise UserError(self._why_nothing())
            self._next += 1
        wanted = self._rollout.prompts or 1
        if first and len(asked) < wanted:
            raise UserError(
                f"{wanted} prompt(s) with {self._rollout.n_samples} response(s) of up to "
                f"{self._rollout.max_new_tokens} tokens do not fit a step of {len(room)} rows of {self._seq_len} "
                f"tokens: raise train.batch_size or data.max_len, or lower rollout.prompts, n_samples or max_new_tokens"
            )
        return asked

    def _room(self) -> np.ndarray:
        """Free tokens in each row of a step before anything is put there."""
        return np.full(self._shape["batch"] * self._shape["accumulate"], self._seq_len)

    def _lengths(self, prompt: Prompt | Fault) -> list[int]:
        """How long the prompt's documents may become; none for a prompt that is left out, which is counted."""
        seen = self.statistics
        if isinstance(prompt, Fault):
            self._refuse_bad(prompt.text)
            seen.skipped += 1
            return []
        if not self._sampled(prompt):
            seen.dropped += not prompt.documents
            return [len(document) for document in prompt.documents]
        seen.longest = max(seen.longest, len(prompt))
        lengths = [len(prompt) + self._rollout.max_new_tokens] * self._rollout.n_samples
        if _reserve(self._room(), lengths, whole=not self._config.data.packing) is not None:
            return lengths
        if self._rollout.on_long_prompt == "stop":
            room = f"data.max_len={self._seq_len}"
            if lengths[0] <= self._seq_len:
                room = f"a step's {len(self._room())} rows of {room}, {len(lengths)} times"
            raise UserError(
                f"{prompt.source}: a prompt of {len(prompt)} tokens leaves no room for "
                f"rollout.max_new_tokens={self._rollout.max_new_tokens} in {room}; raise it, or set "
                f"rollout.on_long_prompt: skip"
            )
        seen.dropped += 1
        return []

    def _sampled(self, prompt: Prompt) -> bool:
        """Whether the student answers the prompt that comes next: by a coin of its own, or because nobody else did."""
        coin = np.random.default_rng([self._seed, self._next]).random()
        return coin < self._config.distill.on_policy_fraction or prompt.answer is None

    def _draw(self, asked: list[Asked]) -> list[Rollout]:
        """Have the student answer, and judge the answers."""
        jobs = [(a, sample) for a in asked if a.sampled for sample in range(self._rollout.n_samples)]
        seeds = [_seed_of(self._seed, a.number, sample) for a, sample in jobs]
        completions = self.engines.generate([a.prompt.ids for a, _ in jobs], seeds) if jobs else []
        rollouts = []
        for (a, sample), seed, completion in zip(jobs, seeds, completions, strict=True):
            text = response_text(self._tokenizer, completion.ids, self.engines.stop_ids)
            rollouts.append(
                Rollout(
                    prompt=a.number,
                    sample=sample,
                    source=a.prompt.source,
                    finish_reason=completion.finish_reason,
                    length=len(completion.ids),
                    text=text,
                    version=completion.version,
                    seed=seed,
                    prompt_ids=a.prompt.ids.tolist(),
                    ids=completion.ids.tolist(),
                    logprobs=shown(completion.logprobs),
                    reward=None if self._reward is None else score(self._reward, a.prompt, text),
                )
            )
        return rollouts

    def _place(self, number: int, asked: list[Asked], rollouts: list[Rollout]) -> list[list[Document]]:
        """The step's documents in rows."""
        wanted = [
            (a.number, sample, a.prompt.ids.tolist())
            for a in asked
            if a.sampled
            for sample in range(self._rollout.n_samples)
        ]
        if [(r.prompt, r.sample, r.prompt_ids) for r in rollouts] != wanted:
            raise UserError(
                f"{self._log.path(number)} answers other prompts than step {number} asks; delete it, and they are "
                f"drawn again"
            )
        placed: list[tuple[int, Document]] = []
        advantages = iter(advantages_of(rollouts, self._rollout))
        answers = iter(rollouts)
        of: dict[Document, Rollout] = {}
        for a in asked:
            documents: Sequence[Document | None] = a.prompt.documents
            if a.sampled:
                answered = [next(answers) for _ in a.rows]
                documents = [
                    rollout_document(a.prompt, r.completion, self._rollout, advantage)
                    for r, advantage in zip(answered, advantages, strict=False)
                ]
                of |= {document: r for document, r in zip(documents, answered, strict=True) if document is not None}
            placed += [(row, d) for row, d in zip(a.rows, documents, strict=True) if d is not None]
        self._written[number] = rollouts, of
        return self._packed(placed)

    def _packed(self, placed: list[tuple[int, Document]]) -> list[list[Document]]:
        """Documents in as few rows as they need, now that their lengths are known, or else in those kept for them."""
        count, documents = self._shape["batch"] * self._shape["accumulate"], [document for _, document in placed]
        if self._config.data.packing:
            filled, left = pack([len(document) for document in documents], rows=count, seq_len=self._seq_len)
            if not left:
                return [[documents[i] for i in row] for row in filled]
        rows: list[list[Document]] = [[] for _ in range(count)]
        for row, document in placed:
            rows[row].append(document)
        return [row for row in rows if row]

    def _micro_batches(self, rows: int) -> int:
        """How many it takes for so many rows; a power of two where that is not all, so that few programs are made."""
        needed = max(1, -(-rows // self._shape["batch"]))
        return min(self._shape["accumulate"], 1 << (needed - 1).bit_length())

    def _count(self, host: HostBatch, rollouts: list[Rollout]) -> None:
        seen = self.statistics
        seen.batches += 1
        seen.documents += len(host.documents)
        seen.truncated += sum(r.finish_reason == "length" for r in rollouts)
        seen.tokens += host.tokens
        seen.loss_tokens += host.loss_tokens
        seen.positions += host.tokens + host.padding

    def _left_out(self) -> dict[str, float]:
        seen = self.statistics
        return {"rollout/prompts_too_long": float(seen.dropped), "rollout/prompts_malformed": float(seen.skipped)}

    def _first_left_out(self, number: int, before: dict[str, float]) -> Iterator[str]:
        for name, count in self._left_out().items():
            if count and not before[name]:
                what = name.removeprefix("rollout/").replace("_", " ")
                yield f"step {number}: the first {what}, left out; {name} counts them"

    def _notes(self, number: int, asked: list[Asked], rollouts: list[Rollout]) -> Iterator[str]:
        if len(asked) < (self._rollout.prompts or 1):
            yield (
                f"step {number}: {len(asked)} of rollout.prompts={self._rollout.prompts}: more, with responses of up "
                f"to {self._rollout.max_new_tokens} tokens, are not sure to fit its rows"
            )
        where = f"step {number}: all {len(rollouts)} responses"
        cut, empty = sum(r.finish_reason == "length" for r in rollouts), sum(map(is_empty, rollouts))
        if rollouts and cut == len(rollouts):
            yield (
                f"warning: {where} were cut at rollout.max_new_tokens={self._rollout.max_new_tokens}, none ended by "
                f"itself. The student may not know yet how to end, or its end-of-turn token is not among the ids that "
                f"stop its engine: compare the chat template with rollout.stop_ids"
            )
        elif rollouts and empty == len(rollouts):
            yield (
                f"warning: {where} are empty: the end came at once. The prompt may end with an end-of-sequence token, "
                f"or the chat template may add no header for the assistant's turn"
            )
        elif rollouts and cut + empty == len(rollouts):
            yield (
                f"warning: step {number}: {cut} of {len(rollouts)} responses were cut at rollout.max_new_tokens="
                f"{self._rollout.max_new_tokens} and {empty} are empty: none is a whole answer"
            )
        every = self._rollout.show_every
        if rollouts and every is not None and (number == 1 or number % every == 0):
            question = next(a.prompt.text for a in asked if a.sampled)
            yield f"step {number}: {sample_text(question, rollouts[0])}"

    def _why_nothing(self) -> str:
        seen = self.statistics
        return (
            f"data: none of the {seen.rows} rows is a prompt to train on: {seen.skipped} malformed, {seen.dropped} too "
            f"long for data.max_len={self._seq_len} less rollout.max_new_tokens={self._rollout.max_new_tokens} (the "
            f"longest prompt has {seen.longest} tokens)"
        )


def _reserve(room: np.ndarray, lengths: list[int], whole: bool) -> tuple[int, ...] | None:
    """Rows with room for these lengths, taken out of ``room``; None, and nothing taken, where there is not enough."""
    left, rows = room.copy(), []
    for length in lengths:
        fitting = np.flatnonzero(left >= length)
        if not fitting.size:
            return None
        rows.append(int(fitting[0]))
        left[fitting[0]] = 0 if whole else left[fitting[0]] - length
    room[:] = left
    return tuple(rows)


def _seed_of(seed: int, prompt: int, sample: int) -> int:
    return int(np.random.SeedSequence([seed, prompt, sample]).generate_state(1, np.uint32)[0])


def _rows(placed: Placed, by_shard: np.ndarray) -> np.ndarray:
    count = len(placed.document.labels)
    return by_shard[placed.micro, placed.shard, placed.offset : placed.offset + count]
