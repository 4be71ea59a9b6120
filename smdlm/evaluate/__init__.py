"""Metrics by name: those of a model and validation data (config.eval.metrics), and those of samples (Protocol.also)."""

from smdlm.evaluate.base import Evaluator
from smdlm.evaluate.lab import LabLikelihood, LabSamples
from smdlm.evaluate.likelihood import Likelihood
from smdlm.evaluate.samples import SampleMetric
from smdlm.evaluate.steps import DecodingSteps
from smdlm.evaluate.text import Blank, Code, Distinct, Entropy, RealWords, Repetition

EVALUATORS: dict[str, type[Evaluator]] = {
    "likelihood": Likelihood,
    "decoding_steps": DecodingSteps,
    "lab": LabSamples,
    "lab_likelihood": LabLikelihood,
}
# Those that need samples alone; generative perplexity and MAUVE, which need a scorer, are made by the protocol.
SAMPLE_METRICS: dict[str, type[SampleMetric]] = {
    "entropy": Entropy,
    "distinct": Distinct,
    "repetition": Repetition,
    "blank": Blank,
    "real_words": RealWords,
    "code": Code,
}
# real_words asks for the training text, which only the end of a run has at hand.
OF_A_FILE = {name: metric for name, metric in SAMPLE_METRICS.items() if metric is not RealWords}
