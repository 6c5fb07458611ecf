"""kdjax: distil a large language model into a small one on JAX.

The teacher runs in SGLang, its last hidden states cross without a copy, the jit-compiled step recomputes its logits and
a Flax student learns from them. These names are what a researcher needs; ``python -m kdjax.train`` only calls them.
"""

from kdjax.algorithms import Frozen, Teacher, Term, make_algorithm, register_algorithm
from kdjax.config import Config, load_config
from kdjax.errors import UserError
from kdjax.generation.rewards import find_reward, register_reward
from kdjax.head import Head
from kdjax.losses import (
    divergence,
    linear_divergence,
    linear_objective,
    linear_statistics,
    register_divergence,
)
from kdjax.models import export_hf, load_model
from kdjax.sharding import Rules, make_mesh
from kdjax.training.device_batch import DeviceBatch
from kdjax.training.evaluation import Evaluation, Evaluator, register_evaluation
from kdjax.training.loop import Result, train
from kdjax.training.optimizer import make_optimizer, make_schedule
from kdjax.training.sources import Stream, stream
from kdjax.training.step import Step, make_step
from kdjax.training.student import make_student

__all__ = [
    "Config",
    "DeviceBatch",
    "Evaluation",
    "Evaluator",
    "Frozen",
    "Head",
    "Result",
    "Rules",
    "Step",
    "Stream",
    "Teacher",
    "Term",
    "UserError",
    "divergence",
    "export_hf",
    "find_reward",
    "linear_divergence",
    "linear_objective",
    "linear_statistics",
    "load_config",
    "load_model",
    "make_algorithm",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "make_step",
    "make_student",
    "register_algorithm",
    "register_divergence",
    "register_evaluation",
    "register_reward",
    "stream",
    "train",
]
