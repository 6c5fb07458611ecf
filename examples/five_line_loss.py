"""A divergence of one's own. Train with it from the command line, at the memory of the built-in ones:

python -m kdjax.train --config configs/quickstart.yaml distill.loss=examples/five_line_loss.py:power output=runs/power
"""

import jax
import jax.numpy as jnp


def power(student_logits, teacher_logits, *, temperature=1.0, order=2.0):
    """Rényi divergence of order α: log Σ p^α q^(1−α) / (α − 1), per position; α → 1 is the KL divergence."""
    log_p = jax.nn.log_softmax(teacher_logits / temperature)
    log_q = jax.nn.log_softmax(student_logits / temperature)
    return jax.nn.logsumexp(order * log_p + (1 - order) * log_q, axis=-1) / jnp.float32(order - 1)
