"""Metrics by the names that config.eval.metrics gives them."""

from smdlm.evaluate.base import Evaluator
from smdlm.evaluate.lab import LabLikelihood, LabSamples
from smdlm.evaluate.likelihood import Likelihood

EVALUATORS: dict[str, type[Evaluator]] = {
    "likelihood": Likelihood,
    "lab": LabSamples,
    "lab_likelihood": LabLikelihood,
}
