"""Does the fused loss give the same numbers on any mesh, and does nothing large cross devices inside its loop?"""

import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from kdjax import backend
from kdjax.losses import Head, linear_objective, linear_statistics
from kdjax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("optimized")

ROWS, WIDTH, TEACHER_WIDTH = 21, 8, 12  # rows that no mesh divides


def user_loss(student_logits, teacher_logits, *, temperature=1.0):
    p = jax.nn.softmax(teacher_logits / temperature)
    return -(p * jax.nn.log_softmax(student_logits / temperature)).sum(-1)


def arrays(student_vocab, teacher_vocab, rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    student = (rows, WIDTH), (WIDTH, student_vocab), (student_vocab,)
    teacher = (rows, TEACHER_WIDTH), (teacher_vocab, TEACHER_WIDTH)
    moving = [rng.standard_normal(shape).astype(np.float32) for shape in student + teacher]
    return moving, rng.integers(0, min(student_vocab, teacher_vocab), rows), rng.random(rows) < 0.7


def value_and_slopes(name, student_vocab, teacher_vocab, mesh=None):
    """The objective, its parts, and its gradients in the student's three arrays (for kl the teacher's two too)."""
    everything, labels, mask = arrays(student_vocab, teacher_vocab)
    moving, still = (everything, []) if name == "kl" else (everything[:3], everything[3:])
    valid = np.random.default_rng(1).random(min(student_vocab, teacher_vocab)) < 0.9
    valid = np.append(valid, np.zeros(student_vocab - len(valid), bool)) if student_vocab != teacher_vocab else None

    @jax.jit
    def run(moving):
        def loss(moving):
            hidden, weight, bias, teacher_hidden, teacher_weight = [*moving, *still]
            total, count, parts = linear_objective(
                hidden,
                Head(weight, bias, soft_cap=9.0, valid=valid),
                teacher_hidden,
                Head(teacher_weight, layout="vd"),
                labels=labels,
                mask=mask,
                kd_ratio=0.4,
                divergence=user_loss if name == "user" else name,
                mesh=mesh,
                chunk_rows=None if mesh is None else 2,
            )
            return total, (count, parts)

        return jax.value_and_grad(loss, has_aux=True)(moving)

    return run(moving)


@pytest.fixture(scope="module")
def alone():
    """The numbers of one device."""
    found = {}

    def numbers(*case):
        if case not in found:
            found[case] = value_and_slopes(*case)
        return found[case]

    return numbers


def assert_same(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1), (1, 2, 4)], ids=str)
def test_kl_on_every_kind_of_mesh(alone, shape):
    case = "kl", 53, 61
    assert_same(value_and_slopes(*case, make_mesh(*shape)), alone(*case))


@pytest.mark.parametrize("name", ["rkl", "jsd", "skl", "srkl", "akl", "tvd", "top1_ce", "hrl", "user"])
def test_every_divergence_on_a_mixed_mesh(alone, name):
    case = name, 61, 53
    assert_same(value_and_slopes(*case, make_mesh(2, 2, 2)), alone(*case))


@pytest.mark.parametrize("name", ["kl", "jsd"])
def test_one_pass_over_logits_as_on_a_gpu(alone, name, monkeypatch):
    case = name, 53, 61
    wanted = alone(*case)
    monkeypatch.setattr(backend, "on_cpu", lambda: False)
    assert_same(value_and_slopes(*case, make_mesh(2, 1, 4)), wanted)  # a mesh of no other test: it is traced anew


def test_ties_at_the_border_of_two_parts_of_the_vocabulary():
    """Equal teacher tokens on two devices are taken by ascending id, as on one."""
    hidden, labels, mask = np.ones((4, 1), np.float32), np.zeros(4, int), np.ones(4, bool)
    student = np.random.default_rng(0).standard_normal((1, 16)).astype(np.float32)
    teacher = np.zeros((1, 16), np.float32)
    for name, params in (("akl", {"adaptive_alpha": 0.4}), ("hrl", {"hrl_topk": 6}), ("top1_ce", {})):
        arguments = (hidden, student, hidden, teacher)
        rows = dict(labels=labels, mask=mask, kd_ratio=1.0, divergence=name, **params)
        one = linear_objective(*arguments, **rows)[0]
        split = linear_objective(*arguments, **rows, mesh=make_mesh(1, 1, 4, devices=jax.devices()[:4]))[0]
        assert abs(one - split) < 1e-6


def test_statistics_under_the_ambient_mesh():
    (hidden, weight, bias, teacher_hidden, teacher_weight), labels, mask = arrays(61, 53)
    arguments = hidden, Head(weight, bias), teacher_hidden, Head(teacher_weight, layout="vd")
    wanted = linear_statistics(*arguments, labels=labels, mask=mask)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        found = jax.jit(lambda: linear_statistics(*arguments, labels=labels, mask=mask))()
        groups = dict(groups=np.arange(len(mask)) % 5, group_count=5)
        apart = jax.jit(lambda: linear_statistics(*arguments, labels=labels, mask=mask, **groups))()
    assert found.keys() == wanted.keys()
    assert all(abs(found[name] - wanted[name]) <= 1e-5 * abs(wanted[name]) for name in wanted)
    by_group = linear_statistics(*arguments, labels=labels, mask=mask, **groups)
    assert all(np.allclose(apart[name], by_group[name], rtol=1e-5, atol=1e-5) for name in wanted)


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def collectives(text):
    """Of a compiled program: (kind, elements of its result, whether inside a loop) of each collective."""
    computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    inside = set()
    waiting = [name for body in computations.values() for name in re.findall(r"(?:body|condition)=%?([\w.\-]+)", body)]
    while waiting:
        name = waiting.pop()
        if name in computations and name not in inside:
            inside.add(name)
            waiting += re.findall(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)", computations[name])
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", computations[name]):
                waiting += re.findall(r"[\w.\-]+", branches)
    for name, body in computations.items():
        for shapes, kind in COLLECTIVE.findall(body):
            dimensions = [dims.split(",") if dims else [] for dims in re.findall(r"\[([\d,]*)\]", shapes)]
            yield kind, sum(int(np.prod([int(n) for n in dims])) for dims in dimensions), name in inside


@pytest.mark.parametrize("name", ["kl", "jsd", "tvd", "top1_ce", "akl", "hrl", "user"])
def test_what_crosses_devices(name):
    """An fsdp-sharded head is gathered once, its gradient added up once; in the loop go a few numbers a row."""
    mesh, rows, vocab, chunk = make_mesh(1, 2, 4), 64, 512, 8
    (hidden, weight, _, teacher_hidden, _), labels, mask = arrays(vocab, vocab, rows)
    teacher_weight = np.zeros((TEACHER_WIDTH, vocab), np.float32)

    def place(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    def loss(hidden, weight, teacher_hidden, teacher_weight, labels, mask):
        divergence = user_loss if name == "user" else name
        rows = dict(labels=labels, mask=mask, kd_ratio=0.5, divergence=divergence, chunk_rows=chunk)
        return linear_objective(hidden, weight, teacher_hidden, teacher_weight, **rows)[0]

    batch = ("data", "fsdp")
    arguments = (
        place(hidden, batch),
        place(weight, "fsdp", "tensor"),
        place(teacher_hidden, batch),
        place(teacher_weight, "fsdp", "tensor"),
        place(labels, batch),
        place(mask, batch),
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()
    found = list(collectives(compiled.as_text()))
    in_loop = [(kind, size) for kind, size, inside in found if inside]
    once = [(kind, size) for kind, size, inside in found if not inside]
    block = chunk * vocab // 4  # a chunk's logits on one device
    assert in_loop, "the vocabulary is split, so rows must be combined in the loop"
    if name == "user":
        assert {kind for kind, size in in_loop if size >= block} == {"all-to-all"}
        assert max(size for _, size in in_loop) <= block
    else:
        assert max(size for _, size in in_loop) <= chunk * 5 * 4  # hrl's five candidates of four devices
    gathered = [size for kind, size in once if kind == "all-gather"]
    assert sorted(gathered)[-2:] == [WIDTH * vocab // 4, TEACHER_WIDTH * vocab // 4]
    assert max(size for kind, size in once if kind != "all-gather") <= WIDTH * vocab // 4  # the head's gradient
