"""The recipes of docs/extending.md, executed as they stand there."""

import csv
import dataclasses
import functools
import math
import os
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from smdlm.data.sources import SOURCES, Document, NoText
from smdlm.evaluate import EVALUATORS
from smdlm.evaluate.base import Value, ratio
from smdlm.models import MODELS
from smdlm.models.attention import attention, not_after
from smdlm.models.base import Head, KVCache, MatrixAxes, Model
from smdlm.models.layers import logical, rotary
from smdlm.sampling.policies import POLICIES
from smdlm.softmask import GATES, MIXERS, inverse_softplus

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
LIBRARIES = [csv, dataclasses, functools, math, os, jax]
NAMES = [
    Document,
    NoText,
    Value,
    ratio,
    attention,
    not_after,
    Head,
    KVCache,
    MatrixAxes,
    Model,
    logical,
    rotary,
    inverse_softplus,
]
TABLES = {
    "SOURCES": SOURCES,
    "EVALUATORS": EVALUATORS,
    "MODELS": MODELS,
    "POLICIES": POLICIES,
    "GATES": GATES,
    "MIXERS": MIXERS,
}


def code(kind):
    """The one block of the page that is marked ```python KIND."""
    (found,) = re.findall(rf"^```python {kind}\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    return found


def recipe(kind):
    """Names that the block defines; the tables it enters itself into are copies of ours, under their names."""
    names = {library.__name__: library for library in LIBRARIES} | {name.__name__: name for name in NAMES}
    names |= {"nn": nn, "jnp": jnp, "np": np, **{name: dict(table) for name, table in TABLES.items()}}
    exec(compile(code(kind), f"docs/extending.md, {kind}", "exec"), names)
    return names
