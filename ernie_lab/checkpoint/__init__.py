"""Checkpoints: configs, names of tensors, reading and writing of weights, the hub."""

from ernie_lab.checkpoint.config import ConfigError, ModelConfig, TextConfig, VLConfig
from ernie_lab.checkpoint.config_json import read_config, read_config_file, write_config
from ernie_lab.checkpoint.errors import CheckpointError, ModelUnavailable, NotEnoughMemory
from ernie_lab.checkpoint.hub import Located, locate
from ernie_lab.checkpoint.layout import Layout
from ernie_lab.checkpoint.load import LoadReport, fill
from ernie_lab.checkpoint.memory import (
    ParameterCounts,
    count_parameters,
    require_memory,
    weight_bytes,
)
from ernie_lab.checkpoint.names import LAYOUTS, VL_LAYOUTS, detect
from ernie_lab.checkpoint.reader import Reader
from ernie_lab.checkpoint.save import save_model

__all__ = [
    "LAYOUTS",
    "VL_LAYOUTS",
    "CheckpointError",
    "ConfigError",
    "Layout",
    "LoadReport",
    "Located",
    "ModelConfig",
    "ModelUnavailable",
    "NotEnoughMemory",
    "ParameterCounts",
    "Reader",
    "TextConfig",
    "VLConfig",
    "count_parameters",
    "detect",
    "fill",
    "locate",
    "read_config",
    "read_config_file",
    "require_memory",
    "save_model",
    "weight_bytes",
    "write_config",
]
