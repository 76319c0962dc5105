"""Experiments on many prompts: what an edit does, how sure that is, and by which path it acts."""

from ernie_lab.experiments.comparing import compare
from ernie_lab.experiments.effects import Effects, effects

__all__ = ["Effects", "compare", "effects"]
