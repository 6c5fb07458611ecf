"""Student decoders read off a Hugging Face ``config.json``: loading, random weights, export, the weight table."""

from kdjax.models.config import FAMILIES, ModelConfig, Rope
from kdjax.models.decoder import REMAT, Compute, Decoder
from kdjax.models.export import ABOUT, export_hf, recover_exports
from kdjax.models.hf import abstract_model, init_model, load_model
from kdjax.models.teacher import TeacherShape, teacher_head, teacher_shape
from kdjax.models.weights import hf_tensors, param_shardings, state_shardings

__all__ = [
    "ABOUT",
    "FAMILIES",
    "REMAT",
    "Compute",
    "Decoder",
    "ModelConfig",
    "Rope",
    "TeacherShape",
    "abstract_model",
    "export_hf",
    "hf_tensors",
    "init_model",
    "load_model",
    "param_shardings",
    "recover_exports",
    "state_shardings",
    "teacher_head",
    "teacher_shape",
]
