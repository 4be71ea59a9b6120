"""The notebooks of colabs/ run from their first cell to their last, and were saved with what they show."""

import pytest
from conftest import ROOT, environment

NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[notebooks]'")
nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[notebooks]'")


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_saved_with_its_outputs(path):
    """All cells once, in order, without an error; at least one picture; small enough for a repository."""
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert kinds & {"image/png", "image/svg+xml"}
    assert path.stat().st_size < 1_500_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch):
    """In a checkout's folder, in a kernel of its own, each cell in at most five minutes."""
    for name, value in environment(1).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, 4)
    where = {"metadata": {"path": str(ROOT / "colabs")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
