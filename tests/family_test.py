"""The study of the feedback family: every row can be read, and the page of the family names every row."""

import re
from pathlib import Path

import pytest

from configs import family
from smdlm import study
from smdlm.config import CHOICES

PAGE = (Path(__file__).parents[1] / "docs" / "family.md").read_text("utf-8")


@pytest.fixture(scope="module")
def cells():
    return study.read_study(family.get_config())[1]


def test_every_row_is_a_run(cells):
    """A cell for every run and number of steps; rows without training point at weights of the same model."""
    runs = {cell.run for cell in cells}
    assert runs == {"binary", *family.TRAINING, *family.WITHOUT_TRAINING} and len(cells) == 3 * len(runs)
    assert set(family.WEIGHTS) == set(family.WITHOUT_TRAINING)
    for cell in cells:
        assert cell.config.model == cell.trained.model
        if cell.run in family.WITHOUT_TRAINING:
            assert cell.config.softmask.p_sm == cell.trained.softmask.p_sm or cell.weights in (
                "softmask",
                "edits",
                "stages",
            )


def test_no_two_rows_are_the_same(cells):
    """Neither in how they train nor in how they sample."""
    at = [cell for cell in cells if cell.changed["steps"] == 8 and cell.run != "binary_on"]
    seen = [(cell.weights, cell.trained, cell.config) for cell in at]
    assert all(one != two for i, one in enumerate(seen) for two in seen[:i])


def test_the_page_names_every_row_and_every_class():
    named = {name for code in re.findall("`([^`\n]+)`", PAGE) for name in re.split(r"\W+", code)}
    assert {"binary", *family.TRAINING, *family.WITHOUT_TRAINING} <= named
    tables = [CHOICES["softmask"][field].table for field in ("gate", "mixer", "variant")]
    assert {name for table in tables for name in table} <= named
    assert set(CHOICES["sampling"]["policy"].table) - named <= {
        *("remdm_rescale", "remdm_conf", "remdm_loop", "forward_backward", "max_prob", "margin", "entropy"),
        "first_hitting",
    }
