"""The table of operators: how a canvas is embedded with what is remembered of it."""

from __future__ import annotations

from smdlm.feedback.committed import Doubt, Stages
from smdlm.feedback.conditioning import CarriedHidden, GatedFeedForward, Projection
from smdlm.full_softmask import FullSoftMask
from smdlm.softmask import SoftMask

# config.softmask.variant
OPERATORS: dict[str, type[SoftMask]] = {
    "topk": SoftMask,
    "full": FullSoftMask,
    "stages": Stages,
    "doubt": Doubt,
    "project": Projection,
    "gated": GatedFeedForward,
    "hidden": CarriedHidden,
}
