"""Experiments on many prompts: what an edit does, how sure that is, and by which path it acts;
and two models side by side."""

from ernie_lab.experiments.comparing import compare
from ernie_lab.experiments.comparing_labs import compare_labs
from ernie_lab.experiments.effects import Effects, effects
from ernie_lab.experiments.lab_comparison import LabComparison

__all__ = ["Effects", "LabComparison", "compare", "compare_labs", "effects"]
