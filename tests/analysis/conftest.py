"""Makes `vl_driver` importable: it records a real vision-language model, with random weights."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "trace"))
