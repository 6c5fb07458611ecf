"""Is the fused loss the plain one, with its gradients, at a fraction of the memory and without needless products?"""

import re

import jax
import jax.numpy as jnp
import loss_reference as reference
import numpy as np
import pytest

from kdjax import backend
from kdjax.errors import UserError
from kdjax.losses import Head, chunks, linear_divergence, linear_objective, linear_statistics

pytestmark = pytest.mark.usefixtures("optimized")


def user_loss(student_logits, teacher_logits, *, temperature=1.0):
    p = jax.nn.softmax(teacher_logits / temperature)
    log_q = jax.nn.log_softmax(student_logits / temperature)
    log_p = jax.nn.log_softmax(teacher_logits / temperature)
    return (p * (log_p - log_q)).sum(-1)


class Case:
    """Rows and two heads of unlike widths: random, or with what the keywords ask for."""

    def __init__(self, rows, student_vocab, teacher_vocab=None, *, layout="dv", width=12, teacher_width=20, seed=0):
        rng = np.random.default_rng(seed)
        teacher_vocab = teacher_vocab or student_vocab
        self.student_hidden = rng.standard_normal((rows, width)).astype(np.float32)
        self.teacher_hidden = rng.standard_normal((rows, teacher_width)).astype(np.float32)
        self.weight = (rng.standard_normal((width, student_vocab)) * 2.5 / width**0.5).astype(np.float32)
        self.teacher_weight = rng.standard_normal((teacher_width, teacher_vocab)) * 2.5 / teacher_width**0.5
        self.teacher_weight = self.teacher_weight.astype(np.float32)
        self.layout = layout
        if layout == "vd":
            self.weight, self.teacher_weight = self.weight.T.copy(), self.teacher_weight.T.copy()
        self.bias = rng.standard_normal(student_vocab).astype(np.float32)
        self.labels = rng.integers(0, min(student_vocab, teacher_vocab), rows)
        self.mask = rng.random(rows) < 0.7
        self.mask[0] = True
        common = min(student_vocab, teacher_vocab)
        gaps = rng.random(common) < 0.9  # ids have gaps, and end before the heads do
        gaps[common - common // 20 :] = False
        self.valid = [np.append(gaps, np.zeros(v - common, bool)) for v in (student_vocab, teacher_vocab)]

    def teacher_head(self, **kwargs):
        return Head(self.teacher_weight, layout=self.layout, **kwargs)

    def reference(self, name, temperature, keep=None, **form):
        """Sums of the divergence and cross-entropy, and the gradients of both in hidden, weight and bias."""
        head = reference.LinearHead(self.weight, self.bias, layout=self.layout, **form)
        teacher = reference.LinearHead(self.teacher_weight, layout=self.layout).logits(self.teacher_hidden)
        student = head.logits(self.student_hidden)
        common = min(student.shape[1], teacher.shape[1])
        plain = "kl" if name == "user" else name
        kd, slope, _ = reference.divergence(plain, student[:, :common], teacher[:, :common], temperature, keep)
        kd_slope = np.zeros_like(student)
        kd_slope[:, :common] = slope
        ce, ce_slope = reference.cross_entropy(student, self.labels)
        m = self.mask
        back = [head.back(self.student_hidden, s * m[:, None]) for s in (kd_slope, ce_slope)]
        return (kd @ m, back[0]), (ce @ m, back[1])


def close(found, wanted, bound=1e-5):
    errors = [reference.relative(a, b) for a, b in zip(found, wanted, strict=True)]
    assert max(errors) < bound, errors


def check_divergence(case, name, temperature, valid=True, chunk_rows=None, **form):
    keep = case.valid[0][: min(map(len, case.valid))] if valid else None
    (value, gradients), _ = case.reference(name, temperature, keep, **form)
    teacher = case.teacher_head(valid=case.valid[1] if valid else None)

    @jax.jit
    @jax.value_and_grad
    def run(moving):
        hidden, weight, bias = moving
        head = Head(weight, bias, layout=case.layout, valid=case.valid[0] if valid else None, **form)
        divergence = user_loss if name == "user" else name
        return linear_divergence(
            hidden,
            head,
            case.teacher_hidden,
            teacher,
            mask=case.mask,
            divergence=divergence,
            temperature=temperature,
            chunk_rows=chunk_rows,
        )[0]

    found, slopes = run((case.student_hidden, case.weight, case.bias))
    assert value > 0.1
    assert abs(found - value) < 1e-5 * value
    close(slopes, gradients)


@pytest.mark.parametrize("name", [*reference.DIVERGENCES, "user"])
def test_small_vocabulary_with_cap_scale_bias_and_a_ragged_last_chunk(name):
    layout = "vd" if name in ("kl", "jsd", "akl", "top1_ce") else "dv"
    check_divergence(Case(11, 53, 61, layout=layout), name, 1.7, chunk_rows=4, soft_cap=6.0, scale=0.8)


@pytest.mark.parametrize("name", reference.DIVERGENCES)
def test_middle_vocabulary(name):
    check_divergence(Case(6, 5_000), name, 1.0, valid=False)


@pytest.mark.parametrize(("name", "layout", "rows"), [("kl", "dv", 22), ("jsd", "vd", 9), ("user", "vd", 3)])
def test_groups_of_chunks_as_on_a_gpu(name, layout, rows, monkeypatch):
    """Two chunks of 5 rows go into one product: ragged groups, one group of two chunks, and one of one."""
    monkeypatch.setattr(backend, "on_cpu", lambda: False)
    monkeypatch.setattr(chunks, "_group_chunks", lambda chunk, hidden: 2)
    check_divergence(Case(rows, 59, 71, layout=layout), name, 1.3, chunk_rows=5, soft_cap=6.0)


def test_a_bfloat16_head_has_its_gradient_rounded_once(monkeypatch):
    """Where one product makes it, it is made in bfloat16; its sums are float32's all the same."""
    monkeypatch.setattr(backend, "on_cpu", lambda: False)
    case = Case(300, 53)
    arrays = case.student_hidden, case.weight, case.teacher_hidden, case.teacher_weight
    half = tuple(jnp.asarray(x, jnp.bfloat16) for x in arrays)
    rounded = tuple(x.astype(jnp.float32) for x in half)

    def loss(*arrays):
        return linear_divergence(*arrays, mask=case.mask)[0]

    hidden, weight = jax.jit(jax.grad(loss, (0, 1)))(*half)
    exact, wanted = jax.jit(jax.grad(loss, (0, 1)))(*rounded)
    assert hidden.dtype == weight.dtype == jnp.bfloat16
    # Slopes are rounded before the products and gradients after them: 2^-9 each at most.
    assert reference.relative(weight, wanted) < 2**-8 and reference.relative(hidden, exact) < 2**-8


@pytest.mark.parametrize("name", reference.DIVERGENCES)
def test_padded_vocabularies_of_unequal_size(name):
    """151,936 against 152,064 columns, as two sizes of one model family have them."""
    sizes = (152_064, 151_936) if name in ("rkl", "tvd") else (151_936, 152_064)
    check_divergence(Case(4, *sizes), name, 1.0, chunk_rows=2)


@pytest.mark.parametrize(("name", "layout"), [("kl", "dv"), ("jsd", "vd"), ("akl", "dv"), ("user", "vd")])
def test_ragged_blocks_and_slices(name, layout, monkeypatch):
    """Blocks of 3 rows in chunks of 7, and the head's gradient in slices of 13 ids: sizes that divide nothing."""
    monkeypatch.setattr(chunks, "_block_rows", lambda columns: 3)
    monkeypatch.setattr(chunks, "SLICE", 12 * 13)
    case = Case(19, 59, 67, layout=layout)
    check_divergence(case, name, 1.3, chunk_rows=7, soft_cap=6.0)
    (kd, kd_slopes), (ce, ce_slopes) = case.reference("kl" if name == "user" else name, 1.0, case.valid[0][:59])

    @jax.jit
    @jax.jacrev
    def run(moving):
        head = Head(moving[1], moving[2], layout=layout, valid=case.valid[0])
        teacher = case.teacher_head(valid=case.valid[1])
        rows = dict(divergence=user_loss if name == "user" else name, labels=case.labels, mask=case.mask, chunk_rows=7)
        return jnp.stack(linear_divergence(moving[0], head, case.teacher_hidden, teacher, **rows)[:2])

    both = run((case.student_hidden, case.weight, case.bias))
    close([slope[0] for slope in both], kd_slopes)
    close([slope[1] for slope in both], ce_slopes)


@pytest.mark.parametrize(("name", "layout"), [("kl", "dv"), ("user", "vd")])
def test_chunks_of_which_no_row_carries_loss(name, layout):
    """Those in the middle and at the end are left out, and what is summed is not touched there."""
    case = Case(31, 59, 67, layout=layout)
    case.mask[8:16], case.mask[24:] = False, False
    check_divergence(case, name, 1.3, chunk_rows=8)


@pytest.mark.parametrize("vocab", [53, 5_000, 151_936])
def test_cross_entropy_uses_the_whole_softmax(vocab):
    case = Case(5, vocab)
    _, (value, gradients) = case.reference("kl", 1.0)

    @jax.jit
    @jax.value_and_grad
    def run(moving):
        hidden, weight, bias = moving
        head = Head(weight, bias, valid=case.valid[0])
        total, count, parts = linear_objective(
            hidden, head, None, None, labels=case.labels, mask=case.mask, kd_ratio=0.3, chunk_rows=2
        )
        return total

    found, slopes = run((case.student_hidden, case.weight, case.bias))
    assert abs(found - value) < 1e-5 * value
    close(slopes, gradients)


def test_objective_and_the_separate_terms():
    case = Case(9, 53, 61)
    (kd, kd_gradients), (ce, ce_gradients) = case.reference("jsd", 2.0, case.valid[0])
    options = dict(labels=case.labels, mask=case.mask, divergence="jsd", temperature=2.0, chunk_rows=4)
    teacher = case.teacher_hidden, case.teacher_head(valid=case.valid[1])

    def head(weight, bias):
        return Head(weight, bias, valid=case.valid[0])

    @jax.jit
    def separate(hidden, weight, bias):
        def sums(hidden, weight, bias):
            kd, ce, count = linear_divergence(hidden, head(weight, bias), *teacher, **options)
            return jnp.stack([kd, ce]), count

        found, pull, count = jax.vjp(sums, hidden, weight, bias, has_aux=True)
        return found, pull(jnp.array([1.0, 0.0])), pull(jnp.array([0.0, 1.0])), count

    moving = case.student_hidden, case.weight, case.bias
    found, of_kd, of_ce, count = separate(*moving)
    close([found], [[kd, ce]])
    close(of_kd, kd_gradients)
    close(of_ce, ce_gradients)
    assert count == case.mask.sum()

    def total(moving, ratio, temperature):
        kwargs = options | {"temperature": temperature}
        hidden, weight, bias = moving
        total, count, parts = linear_objective(hidden, head(weight, bias), *teacher, kd_ratio=ratio, **kwargs)
        return 3.0 * total, parts  # a factor that the backward pass has to apply

    wanted = [3 * (0.7 * a + 0.3 * b) for a, b in zip(kd_gradients, ce_gradients, strict=True)]
    for ratio, temperature in ((0.7, 2.0), (jnp.float32(0.7), jnp.float32(2.0))):  # static, and scheduled
        (value, parts), slopes = jax.jit(jax.value_and_grad(total, has_aux=True))(moving, ratio, temperature)
        assert abs(value - 3 * (0.7 * kd + 0.3 * ce)) < 1e-5 * value
        close([parts["kd"], parts["ce"]], [kd, ce])
        close(slopes, wanted)


def test_teacher_gradients_when_asked_for():
    case = Case(7, 53)
    teacher = reference.LinearHead(case.teacher_weight)
    student = reference.LinearHead(case.weight, case.bias).logits(case.student_hidden)
    _, _, slope = reference.divergence("skl", student, teacher.logits(case.teacher_hidden))
    hidden, weight, _ = teacher.back(case.teacher_hidden, slope * case.mask[:, None])

    def loss(teacher_hidden, teacher_weight):
        head = Head(case.weight, case.bias)
        return linear_divergence(
            case.student_hidden, head, teacher_hidden, teacher_weight, divergence="skl", mask=case.mask, chunk_rows=3
        )[0]

    close(jax.jit(jax.grad(loss, (0, 1)))(case.teacher_hidden, case.teacher_weight), (hidden, weight))


def test_one_row_no_rows_and_rubbish_in_rows_without_loss():
    case = Case(1, 53)
    check_divergence(case, "kl", 1.0, valid=False)
    case = Case(6, 53)
    case.mask[:] = False
    rubbish = jnp.full_like(case.teacher_hidden, jnp.nan)

    @jax.jit
    def run(hidden, weight, teacher_hidden, mask):
        def loss(hidden, weight):
            return linear_objective(
                hidden, weight, teacher_hidden, case.teacher_weight, labels=case.labels, mask=mask, kd_ratio=0.5
            )

        (total, pull, (count, parts)) = jax.vjp(
            lambda *moving: (lambda t, c, p: (t, (c, p)))(*loss(*moving)), hidden, weight, has_aux=True
        )
        return total, count, parts, pull(jnp.ones(()))

    for x in jax.tree.leaves(run(case.student_hidden, case.weight, rubbish, case.mask)):
        assert not np.any(x)
    case.mask[2] = True
    clean = run(case.student_hidden, case.weight, case.teacher_hidden, case.mask)
    dirty = run(case.student_hidden, case.weight, rubbish.at[2].set(case.teacher_hidden[2]), case.mask)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (clean, dirty)), strict=True))


def test_bf16_rows_and_weights():
    case = Case(8, 5_000)
    for name in ("student_hidden", "teacher_hidden", "weight", "teacher_weight", "bias"):
        setattr(case, name, np.asarray(jnp.asarray(getattr(case, name), jnp.bfloat16), np.float32))
    (value, gradients), _ = case.reference("kl", 1.0)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (case.student_hidden, case.weight, case.bias)]
    teacher = [jnp.asarray(x, jnp.bfloat16) for x in (case.teacher_hidden, case.teacher_weight)]

    @jax.jit
    @jax.value_and_grad
    def run(moving, teacher):
        hidden, weight, bias = moving
        return linear_divergence(hidden, Head(weight, bias), *teacher, mask=case.mask, chunk_rows=3)[0]

    found, slopes = run(half, teacher)
    assert abs(found - value) < 1e-5 * value  # the logits themselves are float32
    assert all(slope.dtype == jnp.bfloat16 for slope in slopes)
    close([np.asarray(s, np.float32) for s in slopes], gradients, 2**-8)  # their slopes are rounded to bf16 once


def test_statistics():
    case = Case(9, 53, 61)
    student = reference.LinearHead(case.weight, case.bias).logits(case.student_hidden)
    teacher = reference.LinearHead(case.teacher_weight).logits(case.teacher_hidden)
    labels = case.labels.copy()
    labels[:4] = student[:4].argmax(-1)
    keep, m = case.valid[0], case.mask.astype(np.float64)
    s, t = student[:, keep], teacher[:, :53][:, keep]
    log_p, log_q = reference.log_softmax(teacher), reference.log_softmax(student)
    wanted = {
        "count": m.sum(),
        "ce": reference.cross_entropy(student, labels)[0] @ m,
        "accuracy": (student.argmax(-1) == labels) @ m,
        "entropy": -(np.exp(log_q) * log_q).sum(-1) @ m,
        "teacher_ce": reference.cross_entropy(teacher, labels)[0] @ m,
        "teacher_entropy": -(np.exp(log_p) * log_p).sum(-1) @ m,
        "kl": reference.divergence("kl", s, t)[0] @ m,
        "rkl": reference.divergence("rkl", s, t)[0] @ m,
        "agreement": (s.argmax(-1) == t.argmax(-1)) @ m,
    }
    head = Head(case.weight, case.bias, valid=keep)
    teacher_head = case.teacher_head(valid=case.valid[1])
    found = linear_statistics(
        case.student_hidden, head, case.teacher_hidden, teacher_head, labels=labels, mask=case.mask, chunk_rows=4
    )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert abs(found[name] - value) <= 1e-5 * abs(value), name
    groups = np.arange(9) % 3
    apart = linear_statistics(
        case.student_hidden, head, case.teacher_hidden, teacher_head, labels=labels, mask=case.mask,
        groups=groups, group_count=4, chunk_rows=4,
    )  # fmt: skip
    kl = reference.divergence("kl", s, t)[0] * m
    for group in range(4):
        assert apart["count"][group] == m[groups == group].sum()
        assert abs(apart["kl"][group] - kl[groups == group].sum()) <= 1e-5 * kl.sum()
    assert all(abs(apart[name].sum() - wanted[name]) <= 1e-5 * abs(wanted[name]) for name in wanted)
    alone = linear_statistics(case.student_hidden, head, labels=labels, mask=case.mask)
    assert alone.keys() == {"count", "ce", "accuracy", "entropy"}
    assert all(abs(alone[name] - wanted[name]) <= 1e-5 * wanted[name] for name in alone)


def test_head_logits_are_the_reference_logits():
    case = Case(4, 53, layout="vd")
    form = dict(soft_cap=3.0, scale=0.5, layout="vd")
    wanted = reference.LinearHead(case.weight, case.bias, **form).logits(case.student_hidden)
    found = Head(case.weight, case.bias, **form).logits(case.student_hidden)
    assert found.dtype == jnp.float32 and reference.relative(found, wanted) < 1e-6


ROWS, VOCAB, WIDTH, TEACHER_WIDTH = 4_096, 4_864, 64, 96
ABSTRACT = [
    jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in ((ROWS, WIDTH), (WIDTH, VOCAB), (ROWS, TEACHER_WIDTH), (TEACHER_WIDTH, VOCAB))
]


@pytest.mark.parametrize("name", [*reference.DIVERGENCES, "user"])
def test_all_temporaries_together_are_smaller_than_one_block_of_logits(name):
    divergence = user_loss if name == "user" else name

    def loss(hidden, weight, teacher_hidden, teacher_weight):
        options = dict(divergence=divergence, mask=jnp.ones(ROWS, bool), chunk_rows=256)
        return linear_divergence(hidden, weight, teacher_hidden, teacher_weight, **options)[0]

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*ABSTRACT).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * ROWS * VOCAB * 4


def products(fn, *wrt):
    """How many matrix products the compiled gradient (or, without ``wrt``, the value) of ``fn`` takes."""
    case = Case(8, 53)
    arguments = case.student_hidden, case.weight, case.teacher_hidden, case.teacher_weight

    def loss(*arguments):
        return fn(*arguments, labels=case.labels, mask=case.mask)

    traced = jax.jit(jax.grad(loss, wrt) if wrt else loss).lower(*arguments)
    return len(re.findall(r" dot\(", traced.compile().as_text()))


def test_no_needless_product():
    def objective(hidden, weight, teacher_hidden, teacher_weight, ratio=0.5, **rows):
        return linear_objective(hidden, weight, teacher_hidden, teacher_weight, kd_ratio=ratio, **rows)[0]

    assert products(objective) == 2  # both logits, no gradient
    assert products(objective, 0, 1) == 4  # and one product for each of two matrices, whatever the number of terms
    assert products(objective, 0) == 3  # a frozen head, as with LoRA
    assert products(objective, 0, 1, 2, 3) == 6
    assert products(lambda *a, **k: objective(*a, ratio=0.0, **k), 0, 1) == 3  # no teacher logits


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"student_hidden": np.zeros((4, 7), np.float32)}, "student: hidden rows (4, 7) and head (12, 53)"),
        ({"teacher_hidden": np.zeros((5, 20), np.float32)}, "teacher: 5 hidden rows, but the mask has 4"),
        ({"student_head": Head(np.zeros((12, 53), np.float32), np.zeros(7))}, "student: head bias has shape (7,)"),
        ({"teacher_head": None}, "teacher: hidden rows without a head"),
        ({"labels": np.zeros(3, int)}, "labels: shape (3,), but the mask has (4,)"),
        ({"divergence": "ce"}, "set kd_ratio to 0"),
        ({"jsd_beta": 0.5}, "'kl' takes no jsd_beta"),
        ({"kd_ratio": 1.5}, "kd_ratio is 1.5"),
        ({"chunk_rows": 0}, "chunk_rows is 0"),
    ],
)
def test_what_is_refused(unchecked, changed, says):
    case = Case(4, 53)
    arguments = dict(
        student_hidden=case.student_hidden,
        student_head=case.weight,
        teacher_hidden=case.teacher_hidden,
        teacher_head=case.teacher_weight,
        labels=case.labels,
        mask=case.mask,
    )
    with pytest.raises(UserError) as caught:
        linear_objective(**(arguments | changed))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_layout_and_cap_are_checked(unchecked):
    with pytest.raises(UserError, match="neither 'dv'"):
        Head(np.zeros((3, 4)), layout="v")
    with pytest.raises(UserError, match="not positive"):
        Head(np.zeros((3, 4)), soft_cap=0.0)
