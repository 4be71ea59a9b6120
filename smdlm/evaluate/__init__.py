"""Metrics by the names that config.eval.metrics gives them."""

from smdlm.evaluate.base import Evaluator
from smdlm.evaluate.likelihood import Likelihood

EVALUATORS: dict[str, type[Evaluator]] = {"likelihood": Likelihood}
