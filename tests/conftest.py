"""Settings for the whole suite: offline, one seed, one thread (the models are tiny)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Annotations are checked while the tests run, shapes included; users pay nothing for them.
CHECKED = (
    "attention",
    "banks",
    "experts",
    "frames",
    "losses",
    "mlp",
    "moe",
    "norm",
    "resampler",
    "rope",
    "router",
    "vision",
)
install_import_hook([f"ernie_lab.model.{name}" for name in CHECKED], "beartype.beartype")

from support.models import small_config, small_model

from ernie_lab.checkpoint.config import TextConfig
from ernie_lab.model.text import TextModel

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("suite")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def config() -> TextConfig:
    return small_config()


@pytest.fixture
def model() -> TextModel:
    return small_model()
