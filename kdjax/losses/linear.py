"""Losses from hidden rows and heads: what a training step calls.

Each function takes hidden rows [N, width] and heads and never makes logits of all rows. Under a mesh (``mesh=`` or
``jax.set_mesh``) rows are split over ("data", "fsdp") and the vocabulary over "tensor".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from kdjax.arrays import AnyArray, Number
from kdjax.errors import UserError
from kdjax.head import Head, as_head
from kdjax.losses.chunks import Fixed, Plan, Side
from kdjax.losses.divergences import ce, kl, rkl
from kdjax.losses.fused import totals_and_sums
from kdjax.losses.registry import Divergence, find_divergence
from kdjax.losses.vocab import Vocab, masked

Scalar = Float[Array, ""]


def linear_divergence(
    student_hidden: Float[AnyArray, "N D"],
    student_head: Head | Float[AnyArray, "D V"],
    teacher_hidden: Float[AnyArray, "N E"],
    teacher_head: Head | Float[AnyArray, "E W"],
    *,
    divergence: str | Callable[..., Array] = "kl",
    labels: Int[AnyArray, " N"] | None = None,
    mask: Bool[AnyArray, " N"],
    temperature: Number = 1.0,
    mesh: Mesh | AbstractMesh | None = None,
    chunk_rows: int | None = None,
    **params: Any,
) -> tuple[Scalar, Scalar] | tuple[Scalar, Scalar, Scalar]:
    """The divergence of two models from their hidden rows, summed over the rows in ``mask``: ``(sum, count)``.

    With ``labels``, cross-entropy of the same student logits as well: ``(divergence sum, cross-entropy sum, count)``,
    each differentiable on its own (which takes a gradient product for each: train on ``linear_objective``).

    Ids that are not valid in both heads, or that one head lacks, are left out of the divergence on both sides;
    cross-entropy uses the student's whole softmax. A gradient is formed for what is differentiated, the teacher's
    hidden rows and head included, and for nothing else.

    Chunks of rows whose gradient is formed with their value are those of Liger Kernel's fused linear cross-entropy
    (2410.10989), here for two heads. Hidden rows may be float32 or bfloat16, of each model its own: its head is cast to
    their dtype, products accumulate in float32, and gradients come in the dtype of what they are of.

    Args:
        divergence: a name, ``path/my.py:function``, or a function of logits; ``params`` and ``temperature`` go to it.
            They may be arrays, of a schedule for instance, and get no gradient.
        mask: rows that carry loss. The others may hold anything.
        mesh: how to split rows and vocabulary; by default the ambient one.
        chunk_rows: rows whose logits exist at a time on one device; by default 256 to 832 on a CPU and 512 elsewhere,
            or more where V is small. On a GPU slopes of up to 4,096 rows or more wait beside them: see docs/losses.md.

    Returns float32 scalars. Raises UserError for shapes that do not fit and for what ``divergence`` refuses.
    """
    student, teacher = as_head(student_head), as_head(teacher_head)
    found = _comparison(divergence)
    static, traced = _split(found.checked(temperature, params))
    values = Terms(found, static, labels is not None)
    rows = (student_hidden, student), (teacher_hidden, teacher)
    totals, _ = _totals(values, rows, labels, mask, traced, jnp.eye(1 + values.cross_entropy), mesh, chunk_rows)
    return *totals, _count(mask)


def linear_objective(
    student_hidden: Float[AnyArray, "N D"],
    student_head: Head | Float[AnyArray, "D V"],
    teacher_hidden: Float[AnyArray, "N E"] | None,
    teacher_head: Head | Float[AnyArray, "E W"] | None,
    *,
    labels: Int[AnyArray, " N"],
    mask: Bool[AnyArray, " N"],
    kd_ratio: Number = 0.5,
    divergence: str | Callable[..., Array] = "kl",
    temperature: Number = 1.0,
    mesh: Mesh | AbstractMesh | None = None,
    chunk_rows: int | None = None,
    **params: Any,
) -> tuple[Scalar, Scalar, dict[str, Scalar]]:
    """(1 − kd_ratio) · cross-entropy + kd_ratio · divergence, summed over the rows in ``mask``.

    Returns ``(total, count, {"kd": sum, "ce": sum})``: the total is differentiable and costs one gradient product a
    matrix, the parts are reports without gradient. Without a teacher, or with ``kd_ratio=0``, it is cross-entropy
    alone: the teacher's logits are not computed and there is no "kd". Arguments, rules and errors are those of
    ``linear_divergence``; ``kd_ratio`` may be a traced number, as of a schedule, and gets no gradient.
    """
    known = not isinstance(kd_ratio, jax.Array)
    if known and not 0 <= kd_ratio <= 1:
        raise UserError(f"kd_ratio is {kd_ratio}, it must be between 0 and 1")
    student = student_hidden, as_head(student_head)
    if not _has_teacher(teacher_hidden, teacher_head) or (known and kd_ratio == 0):
        alone = Terms(None, (), True)
        total, (sums, _) = _totals(alone, (student,), labels, mask, {}, jnp.ones((1, 1)), mesh, chunk_rows)
        return total[0], _count(mask), {"ce": sums[0]}
    found = _comparison(divergence)
    static, traced = _split(found.checked(temperature, params))
    mixture = jnp.stack([jnp.asarray(kd_ratio, jnp.float32), 1 - jnp.asarray(kd_ratio, jnp.float32)])[None]
    rows = student, (teacher_hidden, as_head(teacher_head))
    both = Terms(found, static, True)
    total, ((kd_sum, ce_sum), _) = _totals(both, rows, labels, mask, traced, mixture, mesh, chunk_rows)
    return total[0], _count(mask), {"kd": kd_sum, "ce": ce_sum}


def linear_rows(
    values: Callable[..., tuple[Array, ...]],
    student_hidden: Float[AnyArray, "N D"],
    student_head: Head | Float[AnyArray, "D V"],
    teacher_hidden: Float[AnyArray, "N E"],
    teacher_head: Head | Float[AnyArray, "E W"],
    *,
    rows: dict[str, Shaped[AnyArray, " N"]],
    mask: Bool[AnyArray, " N"],
    mesh: Mesh | AbstractMesh | None = None,
    chunk_rows: int | None = None,
) -> tuple[Scalar, dict[str, Float[Array, " N"]]]:
    """A function of both logits and of what else is known of a row: its first value summed, and all of them by row.

    Args:
        values: hashable, ``(student_logits, teacher_logits, rows, keep, vocab) -> K`` arrays of one float32 value a row
            of a chunk, named by its attribute ``names``. ``keep`` marks the ids valid in both heads (None: all).
        rows: [N] arrays by name.

    Returns the first value's sum over the rows in ``mask``, differentiable in the student's hidden rows and head, and
    the values of every row without gradient, 0 outside the mask. The other values should be made of ``stop_gradient``
    logits, or slopes that come to nothing are computed. Other arguments and errors as ``linear_divergence``.
    """
    sides = (student_hidden, as_head(student_head)), (teacher_hidden, as_head(teacher_head))
    mixture = jnp.eye(1, len(values.names))
    total, (_, by_row) = _totals(_Plain(values), sides, rows, mask, {}, mixture, mesh, chunk_rows, by_row=True)
    return total[0], dict(zip(values.names, by_row, strict=True))


@dataclass(frozen=True)
class _Plain:
    """A function without traced parameters."""

    values: Callable[..., tuple[Array, ...]]

    def __call__(self, student, teacher, rows, keep, vocab: Vocab, traced: dict[str, Array]) -> tuple[Array, ...]:
        return self.values(student, teacher, rows, keep, vocab)


def linear_statistics(
    student_hidden: Float[AnyArray, "N D"],
    student_head: Head | Float[AnyArray, "D V"],
    teacher_hidden: Float[AnyArray, "N E"] | None = None,
    teacher_head: Head | Float[AnyArray, "E W"] | None = None,
    *,
    labels: Int[AnyArray, " N"],
    mask: Bool[AnyArray, " N"],
    groups: Int[AnyArray, " N"] | None = None,
    group_count: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    chunk_rows: int | None = None,
) -> dict[str, Float[Array, "*P"]]:
    """Sums over the rows in ``mask`` for evaluation, at τ = 1 and without gradient.

    Of the student, over its whole softmax: ``ce`` (−log q[label]), ``accuracy`` (its choice is the label), ``entropy``.
    With a teacher also ``teacher_ce`` and ``teacher_entropy`` over its whole softmax, and over the ids valid in both
    ``kl`` (of p from q), ``rkl`` (of q from p) and ``agreement`` (both make the same choice). ``count`` is the rows.

    With ``groups``, a number from 0 to ``group_count`` − 1 for each row, each sum is a [group_count] array, a sum for
    each group, from the same logits. Raises UserError where one of the two is missing.
    """
    if (groups is None) != (group_count is None):
        raise UserError("groups and group_count go together: a number for each row, and how many numbers there are")
    rows = [(student_hidden, as_head(student_head))]
    if _has_teacher(teacher_hidden, teacher_head):
        rows.append((teacher_hidden, as_head(teacher_head)))
    names = STATISTICS if len(rows) == 2 else STATISTICS[:3]
    known, shape = {"labels": labels}, ()
    if groups is not None:
        known["groups"], shape = groups, (group_count,)
    mixture = jnp.zeros((0, len(names) * (group_count or 1)))
    _, (sums, _) = _totals(Statistics(group_count), tuple(rows), known, mask, {}, mixture, mesh, chunk_rows)
    sums = sums.reshape(len(names), *shape)
    count = _count(mask) if groups is None else jnp.stack([_count(mask & (groups == g)) for g in range(group_count)])
    return dict(zip(names, sums, strict=True)) | {"count": count}


STATISTICS = ("ce", "accuracy", "entropy", "teacher_ce", "teacher_entropy", "kl", "rkl", "agreement")


@dataclass(frozen=True)
class Terms:
    """The values of a row: of the divergence, if there is one, then cross-entropy, if it is wanted."""

    divergence: Divergence | None
    params: tuple[tuple[str, Any], ...]
    cross_entropy: bool

    def __call__(self, student, teacher, labels, keep, vocab: Vocab, traced: dict[str, Array]) -> tuple[Array, ...]:
        values = []
        if self.divergence is not None:
            common = common_ids(student, teacher, keep)
            values.append(self.divergence(*common, vocab=vocab, **dict(self.params), **traced))
        if self.cross_entropy:
            values.append(ce(student, labels, vocab=vocab))
        return tuple(values)


@dataclass(frozen=True)
class Statistics:
    """``STATISTICS`` of a row; with groups each of them once a group, 0 but in the row's own."""

    groups: int | None

    def __call__(self, student, teacher, rows, keep, vocab: Vocab, traced: dict[str, Array]) -> tuple[Array, ...]:
        values = _statistics(student, teacher, rows["labels"], keep, vocab)
        if self.groups is None:
            return values
        return tuple(jnp.where(rows["groups"] == g, value, 0) for value in values for g in range(self.groups))


def _statistics(student, teacher, labels, keep, vocab: Vocab) -> tuple[Array, ...]:
    def own(logits: Array) -> tuple[Array, Array]:
        log_q = vocab.log_softmax(logits)
        return -vocab.at(log_q, labels), -vocab.sum(jnp.exp(log_q) * log_q)

    student_ce, entropy = own(student)
    values = student_ce, (vocab.argmax(student) == labels).astype(jnp.float32), entropy
    if teacher is None:
        return values
    q, p = common_ids(student, teacher, keep)
    same = vocab.argmax(q) == vocab.argmax(p)
    return *values, *own(teacher), kl(q, p, vocab=vocab), rkl(q, p, vocab=vocab), same.astype(jnp.float32)


def common_ids(student: Array, teacher: Array, keep: Array | None) -> tuple[Array, Array]:
    """Both logits on the ids that both heads have, without those that are not valid in both."""
    columns = min(student.shape[-1], teacher.shape[-1])
    return masked(student[..., :columns], keep), masked(teacher[..., :columns], keep)


def _totals(
    values: Callable[..., tuple[Array, ...]],
    rows: tuple[tuple[AnyArray, Head], ...],
    known: PyTree[Shaped[AnyArray, " N"]] | None,
    mask: Bool[AnyArray, " N"],
    traced: dict[str, Array],
    mixture: Array,
    mesh: Mesh | AbstractMesh | None,
    chunk_rows: int | None,
    by_row: bool = False,
) -> tuple[Array, tuple[Array, Array | None]]:
    heads = [head for _, head in rows]
    _check(rows, known, mask, chunk_rows)
    plan = Plan(
        values=values,
        heads=tuple(replace(head, weight=None, bias=None, valid=None) for head in heads),
        sizes=tuple(head.vocabulary for head in heads),
        chunk_rows=chunk_rows,
        mesh=_ambient() if mesh is None else mesh,
        by_row=by_row,
    )
    sides = tuple(Side(hidden, head.weight, head.bias) for hidden, head in rows)
    fixed = Fixed(known, mask, _valid_in_both(heads), jax.lax.stop_gradient(mixture), jax.lax.stop_gradient(traced))
    return totals_and_sums(plan, sides, fixed)


def _has_teacher(hidden: AnyArray | None, head: Head | AnyArray | None) -> bool:
    if (hidden is None) != (head is None):
        raise UserError(f"teacher: {'a head without hidden rows' if hidden is None else 'hidden rows without a head'}")
    return hidden is not None


def _valid_in_both(heads: list[Head]) -> AnyArray | None:
    known = [head.valid for head in heads if head.valid is not None]
    columns = min(head.vocabulary for head in heads)
    if len(heads) == 1 or not known:
        return None
    keep = known[0][:columns]
    return keep if len(known) == 1 else keep & known[1][:columns]


def _ambient() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def _count(mask: AnyArray) -> Scalar:
    return jnp.sum(mask, dtype=jnp.float32)


def _comparison(divergence: str | Callable[..., Array]) -> Divergence:
    found = find_divergence(divergence)
    if found.fn is ce:
        raise UserError("divergence 'ce' compares with labels, not with a teacher; for cross-entropy set kd_ratio to 0")
    return found


def _split(params: dict[str, Any]) -> tuple[tuple[tuple[str, Any], ...], dict[str, Array]]:
    """Parameters that are part of the program, and those that are arrays: scheduled ones do not compile again."""
    traced = {name: value for name, value in params.items() if isinstance(value, jax.Array)}
    return tuple(sorted((name, value) for name, value in params.items() if name not in traced)), traced


def _check(rows, known, mask, chunk_rows) -> None:
    count = mask.shape[0]
    for side, (hidden, head) in zip(("student", "teacher"), rows, strict=False):
        if hidden.ndim != 2 or head.weight.ndim != 2 or hidden.shape[1] != head.width:
            raise UserError(
                f"{side}: hidden rows {hidden.shape} and head {head.weight.shape} in layout {head.layout!r} do not "
                f"fit; rows must be [N, {head.width}]"
            )
        if hidden.shape[0] != count:
            raise UserError(f"{side}: {hidden.shape[0]} hidden rows, but the mask has {count}")
        for name, array in (("bias", head.bias), ("valid", head.valid)):
            if array is not None and array.shape != (head.vocabulary,):
                raise UserError(f"{side}: head {name} has shape {array.shape}, it must be ({head.vocabulary},)")
    for path, of_rows in jax.tree.leaves_with_path(known):
        if of_rows.shape != mask.shape:
            name = jax.tree_util.keystr(path, simple=True) or "labels"
            raise UserError(f"{name}: shape {of_rows.shape}, but the mask has {mask.shape}")
    if chunk_rows is not None and chunk_rows < 1:
        raise UserError(f"chunk_rows is {chunk_rows}, it must be at least 1")
