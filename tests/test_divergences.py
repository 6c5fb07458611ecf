"""Are the divergences what their table says: values, directions, gradients, parameters, masked ids?"""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import loss_reference as reference
import numpy as np
import pytest

import kdjax.losses as losses
from kdjax import backend
from kdjax.errors import UserError
from kdjax.losses.vocab import WHOLE

pytestmark = pytest.mark.usefixtures("optimized")

SIZES = (53, 151_936)
ARGUMENTS = {
    "jsd": {"jsd_beta": 0.3},
    "skl": {"skew_lambda": 0.2},
    "srkl": {"skew_lambda": 0.2},
    "akl": {"adaptive_alpha": 0.4},
    "hrl": {"hrl_topk": 7},
}


def logits(size, rows=3, seed=0, spread=3.0):
    rng = np.random.default_rng([seed, size])
    shared = rng.standard_normal((rows, size))
    return [(spread * (shared + rng.standard_normal((rows, size)))).astype(np.float32) for _ in range(2)]


def pulled(name, student, teacher, **params):
    """Values, and each row's own gradients in both logits."""

    @jax.jit
    def run(student, teacher):
        values, pull = jax.vjp(lambda s, t: losses.divergence(name, s, t, **params), student, teacher)
        return values, *pull(jnp.ones_like(values))

    return run(student, teacher)


@pytest.mark.parametrize("name", reference.DIVERGENCES)
def test_the_reference_gradients_are_those_of_the_reference_values(name):
    student, teacher = (z[:1].astype(np.float64) for z in logits(12, spread=0.7))
    params = dict(ARGUMENTS.get(name, {}))
    if name == "akl":  # no gradient flows through its weight
        p, q = (reference.softmax(z[0] / 1.7) for z in (teacher, student))
        params = {"weight": reference.akl_weight(p, q, 0.4)}
    _, *gradients = reference.divergence(name, student, teacher, 1.7, **params)
    for side, gradient in enumerate(gradients):
        for i in range(12):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [student.copy(), teacher.copy()]
                moved[side][0, i] += step
                ends.append(reference.divergence(name, *moved, 1.7, **params)[0][0])
            assert abs((ends[0] - ends[1]) / 2e-6 - gradient[0, i]) < 1e-7


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", reference.DIVERGENCES)
def test_values_and_gradients(name, size):
    student, teacher = logits(size)
    temperature = 1.0 if size == 151_936 else 1.7
    params = ARGUMENTS.get(name, {}) if size == 53 else {}
    found = pulled(name, student, teacher, temperature=temperature, **params)
    wanted = reference.divergence(name, student, teacher, temperature, **params)
    assert wanted[0].sum() > 0.1
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == jnp.float32
        assert reference.relative(a, b) < 1e-5 if np.any(b) else not np.any(a)


@pytest.mark.parametrize(("name", "size"), [*((name, 53) for name in reference.DIVERGENCES), ("jsd", 5_000)])
def test_one_pass_over_logits_as_on_a_gpu(name, size, monkeypatch):
    monkeypatch.setattr(backend, "on_cpu", lambda: False)
    test_values_and_gradients(name, size)
    if size == 53:
        test_masked_ids_are_out_of_values_and_gradients(name)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_normaliser_at_any_size_of_the_logits(on_cpu, monkeypatch):
    """Shifted far up or down, far apart, equal, or all but one left out: logarithms of sums are those of float64."""
    monkeypatch.setattr(backend, "on_cpu", lambda: on_cpu)
    rows = logits(1000, rows=2)[0]
    rows = np.stack([*rows, rows[0] * 1e4, rows[0] + 3e4, rows[0] - 3e4, np.zeros(1000), np.full(1000, -1e30)])
    rows[-1, 7] = 2.0
    below, log_sum = jax.jit(lambda x: WHOLE.normaliser(x))(rows.astype(np.float32))
    exact = rows.astype(np.float32).astype(np.float64)
    wanted = exact - exact.max(-1, keepdims=True)
    np.testing.assert_allclose(below, wanted, rtol=1e-6)
    # A CPU adds up what is merged one by one, and rounds each time.
    np.testing.assert_allclose(log_sum, np.log(np.exp(wanted).sum(-1, keepdims=True)), rtol=1e-6 if on_cpu else 1e-5)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("name", ["kl", "rkl", "jsd", "skl", "srkl", "ce"])
def test_slopes_that_are_written_out_have_slopes(name, on_cpu, monkeypatch):
    """Along one direction, against differences of the gradients of float64."""
    monkeypatch.setattr(backend, "on_cpu", lambda: on_cpu)
    (student, teacher), (along, _) = logits(53, spread=1.0), logits(53, seed=1)
    other = np.array([0, 52, 17]) if name == "ce" else teacher

    def exact(student):
        return (
            reference.cross_entropy(student, other)[1]
            if name == "ce"
            else reference.divergence(name, student, other)[1]
        )

    ends = (exact(student.astype(np.float64) + step * along) for step in (1e-6, -1e-6))
    wanted = np.subtract(*ends) / 2e-6
    slope = jax.grad(lambda z: losses.divergence(name, z, other).sum())
    assert reference.relative(jax.jvp(slope, (student,), (along,))[1], wanted) < 1e-5
    assert reference.relative(jax.grad(lambda z: (slope(z) * along).sum())(student), wanted) < 1e-5


@pytest.mark.parametrize("on_cpu", [True, False])
def test_reductions_of_half_precision_are_in_float32(on_cpu, monkeypatch):
    monkeypatch.setattr(backend, "on_cpu", lambda: on_cpu)
    rows = jnp.asarray(logits(5_000)[0], jnp.bfloat16)
    exact = np.asarray(rows, np.float64)
    log_p = exact - exact.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    found = WHOLE.log_softmax(rows), *WHOLE.sums(rows, rows), WHOLE.nll(rows, np.zeros(3, int))
    for a, b in zip(found, (log_p, exact.sum(-1), exact.sum(-1), -log_p[:, 0]), strict=True):
        assert a.dtype == jnp.float32 and reference.relative(a, b) < 1e-5


def test_cross_entropy():
    student, _ = logits(53)
    labels = np.array([0, 52, 17])
    values, slope = reference.cross_entropy(student, labels)
    assert reference.relative(losses.ce(student, labels), values) < 1e-6
    assert reference.relative(losses.divergence("ce", student, labels), values) < 1e-6
    assert reference.relative(jax.grad(lambda z: losses.ce(z, labels).sum())(student), slope) < 1e-6


@pytest.mark.parametrize("name", reference.DIVERGENCES)
def test_masked_ids_are_out_of_values_and_gradients(name):
    student, teacher = logits(53)
    keep = np.random.default_rng(1).random(53) < 0.6
    masked = [np.where(keep, z, -np.inf).astype(np.float32) for z in (student, teacher)]
    found = pulled(name, *masked, temperature=1.3)
    for a, b in zip(found, reference.divergence(name, student, teacher, 1.3, keep=keep), strict=True):
        assert reference.relative(a, b) < 1e-5 if np.any(b) else not np.any(a)
    # one side alone, and everything but one id
    for s, t in ((masked[0], teacher), (student, masked[1]), (np.where(np.arange(53) == 4, masked[0], -np.inf),) * 2):
        assert all(np.isfinite(x).all() for x in pulled(name, s, t))


def test_bf16_logits_are_reduced_in_float32():
    student, teacher = (jnp.asarray(z, jnp.bfloat16) for z in logits(5_000))
    wanted = reference.divergence("kl", *(np.asarray(z, np.float32) for z in (student, teacher)))[0]
    found = losses.kl(student, teacher)
    assert found.dtype == jnp.float32 and reference.relative(found, wanted) < 1e-5


def test_akl_takes_equal_teacher_tokens_by_ascending_id():
    teacher = np.log(np.array([[0.1, 0.3, 0.1, 0.1, 0.1, 0.3]], np.float32))
    student = np.log(np.array([[0.3, 0.2, 0.05, 0.05, 0.2, 0.2]], np.float32))
    forward, reverse = (reference.divergence(n, student, teacher)[0][0] for n in ("kl", "rkl"))
    # Tail at 0.25: ids 0 and 2. |p − q| = 0.2 0.1 0.05 0.05 0.1 0.1, so the head has 0.35 of 0.6.
    w = 0.35 / 0.6
    found = losses.akl(student, teacher, adaptive_alpha=0.25)[0]
    assert abs(found - (w * forward + (1 - w) * reverse)) < 1e-6


def test_jsd_beta_weights_the_teacher():
    student, teacher = logits(53, spread=0.5)
    for beta, end in ((1e-3, losses.kl), (1 - 1e-3, losses.rkl)):
        found = losses.jsd(student, teacher, jsd_beta=beta) / min(beta, 1 - beta)
        assert reference.relative(found, end(student, teacher)) < 0.01


@pytest.mark.parametrize(("skewed", "plain"), [("skl", "kl"), ("srkl", "rkl")])
def test_without_skew_it_is_the_plain_one(skewed, plain):
    student, teacher = logits(53)
    for found, wanted in zip(
        pulled(skewed, student, teacher, skew_lambda=0.0), pulled(plain, student, teacher), strict=True
    ):
        assert reference.relative(found, wanted) < 1e-5


def test_hrl_has_no_temperature():
    student, teacher = logits(53)
    assert np.array_equal(losses.hrl(student, teacher, temperature=4.0), losses.hrl(student, teacher))


def test_forward_mode_works_too():
    student, teacher = logits(53)
    _, gradient, _ = pulled("kl", student, teacher)
    _, slope = jax.jvp(lambda z: losses.kl(z, teacher).sum(), (student,), (teacher,))
    assert abs(slope - (gradient * teacher).sum()) < 1e-4 * abs(slope)


@pytest.fixture(scope="module")
def compiled():
    """One compilation a divergence for all examples below."""

    def build(name):
        def run(student, teacher):
            values, pull = jax.vjp(lambda s, t: losses.divergence(name, s, t, temperature=1.5), student, teacher)
            return values, *pull(jnp.ones_like(values))

        return jax.jit(run)

    return {name: build(name) for name in reference.DIVERGENCES}


# Equal logits, which a shift by 0 makes equal in their bits too.
SIGNED_ZEROS, ONES_AND_A_ZERO = np.full((2, 16), -0.0, np.float32), np.ones((2, 16), np.float32)
TINY = np.zeros((2, 16), np.float32)
TINY[:, 3] = -1e-38
SIGNED_ZEROS[1, [2, 3, 4, 6]], SIGNED_ZEROS[1, 5], ONES_AND_A_ZERO[1, 1] = 0.0, -1.0, 0.0
blocks = hnp.arrays(np.float32, (2, 16), elements=st.floats(-12, 12, width=32))


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(blocks, blocks, hnp.arrays(bool, 16), st.floats(-40, 40, width=32))
@hypothesis.example(SIGNED_ZEROS, ONES_AND_A_ZERO, np.zeros(16, bool), 0.0)
@hypothesis.example(TINY, ONES_AND_A_ZERO, np.zeros(16, bool), 1.0)
def test_properties(compiled, student, teacher, keep, shift):
    keep[3] = True
    for name, run in compiled.items():
        assert (run(student, teacher)[0] >= -2e-6).all(), name
        # hrl compares ranks, and a shift would round to equal what lies closer than its last bit.
        moved = np.round(student * 256) / 256 if name == "hrl" else student
        assert np.allclose(run(moved + shift, teacher)[0], run(moved, teacher)[0], atol=2e-4, rtol=1e-4), name
        if name != "top1_ce":  # a cross-entropy: its least value is not 0
            zero, gradient, _ = run(teacher, teacher)
            assert np.abs(zero).max() < 2e-6 and np.abs(gradient).max() < 2e-6, name
        masked = [np.where(keep, z, -np.inf).astype(np.float32) for z in (student, teacher)]
        for x in run(*masked):
            assert np.isfinite(x).all(), name
            assert x.ndim == 1 or not np.any(np.asarray(x)[:, ~keep]), name


@pytest.mark.parametrize(
    "name, params, says",
    [
        ("jsd", {"jsd_beta": 0.0}, "jsd_beta is 0.0, it must be strictly between 0 and 1"),
        ("jsd", {"jsd_beta": 1.0}, "jsd_beta"),
        ("skl", {"skew_lambda": 1.0}, "skew_lambda"),
        ("srkl", {"skew_lambda": -0.1}, "skew_lambda"),
        ("akl", {"adaptive_alpha": 1.5}, "adaptive_alpha"),
        ("hrl", {"hrl_topk": 0}, "hrl_topk"),
        ("hrl", {"hrl_topk": 54}, "more than the vocabulary's 53 ids"),
        ("kl", {"temperature": 0.0}, "temperature is 0.0, it must be above 0"),
        ("kl", {"jsd_beta": 0.5}, "divergence 'kl' takes no jsd_beta; its parameters: temperature"),
        ("ce", {"temperature": 2.0}, "takes no temperature"),
        ("klx", {}, "did you mean 'kl'"),
    ],
)
def test_what_is_refused(name, params, says):
    with pytest.raises(UserError) as caught:
        losses.divergence(name, *logits(53), **params)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_unequal_vocabularies_are_refused(unchecked):
    with pytest.raises(UserError, match="differ in vocabulary"):
        losses.kl(np.zeros((2, 53)), np.zeros((2, 64)))


def test_all_ten_have_names():
    names = {*reference.DIVERGENCES, "ce"}
    assert len(names) == 10 and {losses.find_divergence(name).name for name in names} == names


def test_a_function_in_a_file_or_registered(tmp_path):
    file = tmp_path / "my.py"
    file.write_text(
        "import jax\n"
        "def mine(student_logits, teacher_logits, *, temperature=1.0, power=2):\n"
        "    gap = jax.nn.softmax(student_logits / temperature) - jax.nn.softmax(teacher_logits / temperature)\n"
        "    return (abs(gap) ** power).sum(-1)\n"
    )
    student, teacher = logits(53)
    found = losses.divergence(f"{file}:mine", student, teacher, temperature=2.0, power=1)
    assert np.allclose(found, 2 * losses.tvd(student, teacher, temperature=2.0), rtol=1e-5)

    @losses.register_divergence("test_gap")
    def gap(student_logits, teacher_logits):
        return (student_logits - teacher_logits).max(-1)

    assert np.allclose(losses.divergence("test_gap", student, teacher), (student - teacher).max(-1))
    with pytest.raises(UserError, match="'test_gap' takes no temperature"):
        losses.divergence("test_gap", student, teacher, temperature=2.0)
    with pytest.raises(UserError, match="one value a row"):
        losses.divergence(lambda s, t: (s - t).mean(), student, teacher)
