"""Pytest's side of the golden tests: all differences of a test in one failure, the closing table, and the models."""

from pathlib import Path

import pytest

from golden import arrays
from golden.models import MDLM, Reference, load_reference
from smdlm.full_softmask import FullSoftMask
from smdlm.softmask import SoftMask

HERE = Path(__file__).parent
STARTED: set[str] = set()  # ids of the golden tests that ran
DESELECTED: set[Path] = set()  # files of the golden tests that were not to run


def is_golden(path: Path) -> bool:
    return HERE in Path(path).parents


def pytest_deselected(items):
    DESELECTED.update(item.path for item in items if is_golden(item.path))


def pytest_collection_modifyitems(items):
    """What asks whether every array was used comes after all that use some."""
    items.sort(key=lambda item: item.name == "test_everything_was_used")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    STARTED.add(item.nodeid)
    arrays.FAILURES.clear()
    result = yield
    if arrays.FAILURES:
        pytest.fail("\n".join(arrays.FAILURES), pytrace=False)
    return result


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    if not STARTED:
        return
    line = terminalreporter.write_line
    line(f"\n{'group':28}{'cases':>7}{'arrays':>8}{'worst':>12}{'tolerance':>12}")
    for group, row in arrays.ROWS.items():
        numbers = f"{len(row.tests):7}{row.arrays:8}{row.worst:12.3g}{group.tolerance:12.3g}"
        line(f"{group.name:28}{numbers}" + (f"  {row.failed} FAILED" if row.failed else ""))


def pytest_unconfigure(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("failed", []) + reporter.stats.get("error", [])
    failed = sum(is_golden(config.rootpath / str(report.fspath)) for report in reports)
    if not STARTED and not failed:
        return
    rows = arrays.ROWS.values()
    reporter.write_line(
        f"{sum(row.arrays for row in rows)} arrays compared in {len(rows)} groups: "
        f"{sum(row.failed for row in rows)} differ, {failed} tests failed, {len(unused())} stored arrays not used, "
        f"files the set does not have: {', '.join(sorted(arrays.MISSING)) or 'none'}"
    )


def unused() -> list[str]:
    return [name for folder in arrays.FOLDERS for name in folder.unused()]


@pytest.fixture
def unused_arrays(request) -> list[str]:
    """Names of the stored arrays that no test has read, after all of the tests."""
    selected = {item.path for item in request.session.items}
    if DESELECTED or not selected.issuperset(HERE.glob("*_test.py")):
        pytest.skip("only some of the golden tests were selected")
    return unused()


@pytest.fixture(scope="session")
def diffusion() -> Reference:
    stored = MDLM.arrays("loss.npz")
    k = stored["pass2_indices"].shape[-1] - 1
    return load_reference("mdlm", "mdlm", int(stored["mask_index"]), SoftMask(k=k))


@pytest.fixture(scope="session")
def full() -> Reference:
    """The same weights under the full-distribution operator with its temperature."""
    return load_reference("mdlm", "mdlm", int(MDLM.arrays("loss.npz")["mask_index"]), FullSoftMask(chunk=17))


@pytest.fixture(scope="session")
def autoregressive() -> Reference:
    return load_reference("ar", "ar", int(MDLM.arrays("ar.npz")["mask_index"]), None)
