"""Metrics by name: those of a model and validation data (config.eval.metrics), and those of samples."""

from smdlm.evaluate.base import Evaluator
from smdlm.evaluate.genppl import GenerativePerplexity
from smdlm.evaluate.likelihood import Likelihood
from smdlm.evaluate.mauve import Mauve
from smdlm.evaluate.samples import SampleMetric
from smdlm.evaluate.text import Blank, Code, Distinct, Entropy, Repetition

EVALUATORS: dict[str, type[Evaluator]] = {"likelihood": Likelihood}
SAMPLE_METRICS: dict[str, type[SampleMetric]] = {
    "generative_perplexity": GenerativePerplexity,
    "mauve": Mauve,
    "entropy": Entropy,
    "distinct": Distinct,
    "repetition": Repetition,
    "blank": Blank,
    "code": Code,
}
