"""The run configuration: frozen typed groups, filled from YAML and dotted overrides, checked before anything loads."""

from kdjax.config.generate import GenerateConfig
from kdjax.config.groups import (
    CheckpointConfig,
    Config,
    DataConfig,
    DistillConfig,
    LogConfig,
    MeshConfig,
    SourceConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from kdjax.config.read import from_dict, load_config, reference, to_dict, to_yaml
from kdjax.config.rollout import RolloutConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "GenerateConfig",
    "LogConfig",
    "MeshConfig",
    "RolloutConfig",
    "SourceConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "from_dict",
    "load_config",
    "reference",
    "to_dict",
    "to_yaml",
]
