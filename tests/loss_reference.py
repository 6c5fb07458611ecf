"""Every loss once more in float64 NumPy, written from its definition: values, and gradients worked out by hand.

Ids that are left out are really cut away here, where the library masks them.
"""

import numpy as np

DIVERGENCES = ("kl", "rkl", "jsd", "skl", "srkl", "akl", "tvd", "top1_ce", "hrl")


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def akl_weight(p, q, alpha):
    """Of one row. The tail: least likely teacher tokens, lower ids first, while their cumulative p stays <= alpha."""
    order = np.lexsort((np.arange(len(p)), p))
    tail = np.zeros(len(p), bool)
    tail[order[np.cumsum(p[order]) <= alpha]] = True
    gap = np.abs(p - q)
    head, rest = gap[~tail].sum(), gap[tail].sum()
    return head / (head + rest) if head + rest > 0 else 1.0


def top(z, k):
    return np.lexsort((np.arange(len(z)), -z))[:k]


def _row(name, s, t, temperature, params):
    """Value of one row and its slopes in the probabilities q (student) and p (teacher)."""
    tau = 1.0 if name == "hrl" else temperature
    q, p, lq, lp = softmax(s / tau), softmax(t / tau), log_softmax(s / tau), log_softmax(t / tau)
    one = np.ones_like(p)
    if name == "kl":
        return (p * (lp - lq)).sum(), -p / q, lp - lq + 1
    if name == "rkl":
        return (q * (lq - lp)).sum(), lq - lp + 1, -q / p
    if name == "jsd":
        beta = params.get("jsd_beta", 0.5)
        lm = np.log(beta * p + (1 - beta) * q)
        value = beta * (p * (lp - lm)).sum() + (1 - beta) * (q * (lq - lm)).sum()
        return value, (1 - beta) * (lq - lm), beta * (lp - lm)
    if name == "skl":
        lam = params.get("skew_lambda", 0.1)
        m = lam * p + (1 - lam) * q
        return (p * (lp - np.log(m))).sum(), -(1 - lam) * p / m, lp - np.log(m) + 1 - lam * p / m
    if name == "srkl":
        lam = params.get("skew_lambda", 0.1)
        m = (1 - lam) * p + lam * q
        return (q * (lq - np.log(m))).sum(), lq - np.log(m) + 1 - lam * q / m, -(1 - lam) * q / m
    if name == "akl":
        w = params["weight"] if "weight" in params else akl_weight(p, q, params.get("adaptive_alpha", 0.5))
        forward, forward_q, forward_p = _row("kl", s, t, tau, {})
        reverse, reverse_q, reverse_p = _row("rkl", s, t, tau, {})
        mixed = [(forward, reverse), (forward_q, reverse_q), (forward_p, reverse_p)]
        return tuple(w * a + (1 - w) * b for a, b in mixed)
    if name == "tvd":
        return 0.5 * np.abs(p - q).sum(), 0.5 * np.sign(q - p), 0.5 * np.sign(p - q)
    if name == "top1_ce":
        best = top(t, 1)[0]
        slope_q, slope_p = 0 * one, 0 * one
        slope_q[best], slope_p[best] = -p[best] / q[best], -lq[best]
        return -p[best] * lq[best], slope_q, slope_p
    if name == "hrl":
        k = params.get("hrl_topk", 5)
        of_teacher, of_student = top(t, k), top(s, k)
        value, slope = 0.0, 0 * one
        pairs = [(i, of_teacher[0]) for i in of_teacher]
        pairs += [(j, i) for i in of_teacher for j in of_student if t[i] > t[j]]
        for up, down in pairs:
            if q[up] > q[down]:
                value += q[up] - q[down]
                slope[up] += 1
                slope[down] -= 1
        return value, slope, 0 * one
    raise ValueError(name)


def divergence(name, student, teacher, temperature=1.0, keep=None, **params):
    """float64 [N] values and their [N, V] gradients in student and teacher logits, each row's its own."""
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    keep = np.ones(student.shape[-1], bool) if keep is None else keep
    values, d_student, d_teacher = np.zeros(len(student)), np.zeros_like(student), np.zeros_like(teacher)
    tau = 1.0 if name == "hrl" else temperature
    for n, (s, t) in enumerate(zip(student[:, keep], teacher[:, keep], strict=True)):
        values[n], slope_q, slope_p = _row(name, s, t, temperature, params)
        for out, z, slope in ((d_student, s, slope_q), (d_teacher, t, slope_p)):
            probability = softmax(z / tau)
            out[n, keep] = probability * (slope - (probability * slope).sum()) / tau
    return values, d_student, d_teacher


def cross_entropy(student, labels):
    student = np.asarray(student, np.float64)
    rows = np.arange(len(student))
    slope = softmax(student)
    slope[rows, labels] -= 1
    return -log_softmax(student)[rows, labels], slope


class LinearHead:
    """float64 logits of a head, and the way back from their slope."""

    def __init__(self, weight, bias=None, soft_cap=None, scale=1.0, layout="dv"):
        weight = np.asarray(weight, np.float64)
        self.layout, self.soft_cap, self.scale = layout, soft_cap, scale
        self.weight = weight if layout == "dv" else weight.T
        self.bias = 0.0 if bias is None else np.asarray(bias, np.float64)

    def logits(self, hidden):
        z = self.scale * (np.asarray(hidden, np.float64) @ self.weight + self.bias)
        return z if self.soft_cap is None else self.soft_cap * np.tanh(z / self.soft_cap)

    def back(self, hidden, slope):
        """Gradients in hidden rows, weight (in its layout) and bias."""
        if self.soft_cap is not None:
            slope = slope * (1 - (self.logits(hidden) / self.soft_cap) ** 2)
        slope = slope * self.scale
        weight = np.asarray(hidden, np.float64).T @ slope
        return slope @ self.weight.T, weight if self.layout == "dv" else weight.T, slope.sum(0)


def relative(found, wanted):
    """‖found − wanted‖ / ‖wanted‖."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
