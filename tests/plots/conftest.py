"""Makes `vl_driver` importable: it records a real vision-language model, with random weights."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "trace"))


@pytest.fixture(scope="session")
def recorded():
    """Three sequences: two images; a clip; text alone. With two decoding steps."""
    from support.models import small_vl_model
    from vl_driver import MIXED, NEW, record

    keep = ("routing", "blocks.*.attn.pattern")
    return record(small_vl_model(), MIXED, keep, new=NEW)
