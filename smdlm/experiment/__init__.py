"""What one does with an experiment: train, evaluate, sample, restore. The same for programs, notebooks and tests.

WORKDIR/checkpoints/      see io/checkpoint.py
WORKDIR/metrics.jsonl ..  see io/writer.py
"""

from smdlm.experiment.restoring import (
    Loaded,
    check_vocabulary,
    continue_from,
    described,
    frozen_base,
    init_source,
    load_weights,
    restore,
)
from smdlm.experiment.sampling import (
    Sampled,
    answer_records,
    described_weights,
    evaluate,
    fill,
    make_generator,
    prompt_ids,
    sample,
    sample_records,
    sample_values,
    show,
    subject,
    watch,
    watch_answer,
    write_viewer,
)
from smdlm.experiment.training import finished, train
from smdlm.io.checkpoint import checkpointer_of

__all__ = [
    "answer_records",
    "check_vocabulary",
    "checkpointer_of",
    "continue_from",
    "described",
    "described_weights",
    "evaluate",
    "fill",
    "finished",
    "frozen_base",
    "init_source",
    "load_weights",
    "Loaded",
    "make_generator",
    "prompt_ids",
    "restore",
    "sample",
    "sample_records",
    "sample_values",
    "Sampled",
    "show",
    "subject",
    "train",
    "watch",
    "watch_answer",
    "write_viewer",
]
