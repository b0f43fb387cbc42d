"""Training objectives: what turns a batch into one loss per image."""

from fastcm.objectives.base import LossTerms, Objective
from fastcm.objectives.consistency import ECT
from fastcm.objectives.edm import EDMObjective

OBJECTIVES: dict[str, type] = {"edm": EDMObjective, "ect": ECT}

__all__ = ["ECT", "OBJECTIVES", "EDMObjective", "LossTerms", "Objective"]
