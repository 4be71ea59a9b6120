"""The stored arrays, how ours are compared with them, and the account of what was compared.

Folders of the set are `Folder`s, kinds of arrays are `Group`s: a part of the tests names those that it needs, and
shares the ones below with the others.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(os.environ.get("SMDLM_GOLDEN") or Path(__file__).parent)


@dataclasses.dataclass(frozen=True)
class Group:
    """Arrays of one kind: a row of the closing table.

    Attributes:
      tolerance: the largest difference, as a share of the array's size.
      relative: the size is the largest magnitude of the stored array; otherwise it is 1. `check` may be told another.
    """

    name: str
    tolerance: float
    relative: bool = False


# What several parts compare. The factors are those of the set's README, which hold for any depth, width and magnitude.
LOSS = Group("loss", 1e-4)
NOISE = Group("noise", 1e-7)
TOKENS = Group("generated tokens", 0)
TRAJECTORY_FACTOR = 8e-6  # log-probabilities, as a share of the largest logit


@dataclasses.dataclass
class Row:
    """What the closing table says of a group. worst is the largest difference as a share of the size."""

    tests: set[str] = dataclasses.field(default_factory=set)
    arrays: int = 0
    worst: float = 0.0
    failed: int = 0


FOLDERS: list[Folder] = []  # those that some part of the tests reads
ROWS: dict[Group, Row] = {}
FAILURES: list[str] = []  # of the test that runs
MISSING: set[str] = set()  # files that the set does not have


class Folder:
    """One folder of the set. Arrays of its npz files that no test uses are counted in the last line."""

    def __init__(self, path: Path):
        self.path = path
        FOLDERS.append(self)

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def need(self, *names: str) -> Path:
        """The first of these files that the set has; without any the test is skipped and the last line says so."""
        for name in names:
            if self.has(name):
                return self.path / name
        MISSING.add(os.path.relpath(self.path / names[0], ROOT))
        pytest.skip(f"the set has no {' or '.join(names)}")

    def names(self, *suffixes: str) -> list[str]:
        """The files with one of these suffixes, sorted."""
        return sorted(path.name for path in self.path.glob("*") if path.suffix in suffixes)

    @functools.cache  # noqa: B019 (a folder lives as long as the tests do)
    def arrays(self, name: str) -> Arrays:
        return Arrays(self.need(name))

    def unused(self) -> list[str]:
        """'file array' of each stored array that no test has read."""
        stored = [self.arrays(name) for name in self.names(".npz")]
        return [f"{arrays.name} {key}" for arrays in stored for key in arrays.data if key not in arrays.used]


class Arrays:
    """One npz file; remembers which of its arrays were read."""

    def __init__(self, path: Path):
        self.name = os.path.relpath(path, ROOT)
        self.used: set[str] = set()
        with np.load(path) as data:
            self.data = {key: data[key] for key in data.files}

    def __contains__(self, key: str) -> bool:
        return key in self.data

    def __getitem__(self, key: str) -> np.ndarray:
        self.used.add(key)
        value = self.data[key]
        return value.astype(np.int32) if value.dtype == np.int64 and value.ndim else value

    def matches(self, pattern: str) -> list[re.Match]:
        """Full matches of the names, in order."""
        return [m for m in (re.fullmatch(pattern, key) for key in self.data) if m]

    def no_result(self, *keys: str) -> None:
        """Marks arrays that the set has for its readers: neither inputs of a test nor results of anything of ours."""
        self.used.update(keys)

    def check(self, group: Group, key: str, got: Any, where: Any = True, size: float | None = None) -> None:
        """|got - stored| <= tolerance of the group * size at `where`; the default size is the group's."""
        wanted, got = self[key], np.asarray(got)
        assert got.shape == wanted.shape, f"{self.name} {key}: got shape {got.shape}, wanted {wanted.shape}"
        compare(group, f"{self.name} {key}", got, wanted, where, size)


def largest(*arrays: Any) -> float:
    """The largest magnitude. Infinities, and the -1e6 and less that stand for them, are no measure of the numbers."""
    found = 0.0
    for array in arrays:
        magnitude = np.abs(np.asarray(array, np.float64))
        found = max(found, magnitude.max(initial=0.0, where=magnitude < 1e5))
    return found


def compare(group: Group, name: str, got: Any, wanted: Any, where: Any = True, size: float | None = None) -> None:
    """`Arrays.check` for arrays that are not stored under one name."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    same = (got == wanted) | ~np.broadcast_to(where, wanted.shape)  # equal infinities differ by NaN
    difference = np.where(same, 0.0, np.abs(np.where(same, 0.0, got) - np.where(same, 0.0, wanted)))
    if size is None:
        size = largest(wanted) if group.relative else 1.0
    worst = float(difference.max(initial=0.0)) / (size or 1.0)
    row = ROWS.setdefault(group, Row())
    row.tests.add(os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0])
    row.arrays += 1
    row.worst = max(row.worst, worst) if worst == worst else float("nan")
    if not worst <= group.tolerance:  # raised at the end of the test, so that its other arrays are compared, too
        row.failed += 1
        FAILURES.append(f"{name}: got a difference of {worst:.3g}, wanted at most {group.tolerance:.3g} ({group.name})")
