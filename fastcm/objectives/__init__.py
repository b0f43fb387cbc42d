"""Training objectives: what turns a batch into one loss per image."""

from fastcm.objectives.base import LossTerms, Networks, Objective
from fastcm.objectives.ctm import CTM
from fastcm.objectives.discrete import ConsistencyDistillation, ConsistencyTraining, ImprovedConsistencyTraining
from fastcm.objectives.ect import ECT
from fastcm.objectives.edm import EDMObjective
from fastcm.objectives.progressive import ProgressiveDistillation

OBJECTIVES: dict[str, type[Objective]] = {
    "edm": EDMObjective,
    "ect": ECT,
    "cd": ConsistencyDistillation,
    "ct": ConsistencyTraining,
    "ict": ImprovedConsistencyTraining,
    "pd": ProgressiveDistillation,
    "ctm": CTM,
}

__all__ = [
    "CTM",
    "ECT",
    "OBJECTIVES",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "EDMObjective",
    "ImprovedConsistencyTraining",
    "LossTerms",
    "Networks",
    "Objective",
    "ProgressiveDistillation",
]
