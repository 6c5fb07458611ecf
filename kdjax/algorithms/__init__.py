"""What is compared with what: logit distillation, supervised fine-tuning, and a user's own."""

from kdjax.algorithms.base import Frozen, Teacher, Term, check_names, make_algorithm, register_algorithm
from kdjax.algorithms.feature import Feature
from kdjax.algorithms.policy_gradient import PolicyGradientAlgorithm, rollout_terms, sampled_as
from kdjax.algorithms.vanilla import SFT, Vanilla

__all__ = [
    "SFT",
    "Feature",
    "Frozen",
    "PolicyGradientAlgorithm",
    "Teacher",
    "Term",
    "Vanilla",
    "check_names",
    "make_algorithm",
    "register_algorithm",
    "rollout_terms",
    "sampled_as",
]
