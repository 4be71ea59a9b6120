"""The recipes of docs/extending.md, executed as they stand there."""

import re
from pathlib import Path

from smdlm.data.sources import SOURCES
from smdlm.evaluate import EVALUATORS
from smdlm.feedback.gates import GATES
from smdlm.feedback.mixers import MIXERS
from smdlm.models import MODELS
from smdlm.sampling.policies import POLICIES

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
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
    names = {}
    exec(compile(code("imports"), "docs/extending.md, imports", "exec"), names)
    names |= {name: dict(table) for name, table in TABLES.items()}
    exec(compile(code(kind), f"docs/extending.md, {kind}", "exec"), names)
    return names
