"""The performance page: what is shown of what has been measured."""

import json

import pytest

from smdlm.tools import performance
from smdlm.tools.bench import COLUMNS

MESHES = {
    f"mesh {m}": {"mesh": list(m), "losses": [2.0, 1.0 + 1e-6 * i], "first_step_s": 1.0}
    for i, m in enumerate(performance.MESHES)
}


def program(**changes):
    row = dict.fromkeys(("flops_per_chip", "hbm_bytes_per_chip", "parts", "step_ms_roofline", "tokens_per_s", "mfu"))
    sizes = dict.fromkeys(("arguments_gib", "temp_gib", "peak_gib", "hbm_limit_gib", "compile_s"), 1.5)
    return {**row, **sizes, "program": "train", "batch_per_chip": 8.0, "fits": True, **changes}


def test_the_page(monkeypatch):
    """Differences are relative to one device, unknown figures are dashes, and what is missing says how to get it."""
    monkeypatch.setattr(performance, "_compiler", lambda topology: not topology.startswith("h100"))
    over, fine = (performance._name(p) for p in (performance.PROGRAMS[0], performance.PROGRAMS[3]))
    parts = [{"part": part, "hbm_bytes": size} for part, size in (("denoiser", 5e9), ("readout", 2e9))]
    rows = {
        **MESHES,
        over: [program(fits=False)],
        fine: [program(parts=parts)],
        "cpu tiny": dict.fromkeys(COLUMNS, 2.0),
    }
    page = performance.render(rows)
    assert "| 1 | 1 | 1 | 0.0e+00 | 1.0 |" in page and "| 8 | 1 | 1 | 2.0e-06 | 1.0 |" in page
    assert "| owt | plain | train | v5e:4x4 | 8 | 1.50 | 1.50 | 1.50 | 1.50 | no | - | - | - | - | - | - | 2 |" in page
    assert "| yes | - | - | 2.00 | - | - | - | 2 |" in page
    assert "h100: its compiler is missing (`pip install -e '.[cuda]'`)" in page and "for v5e" not in page


def test_an_interrupted_run_goes_on_where_it_was(monkeypatch, tmp_path):
    """Rows that are there are not measured again, and the page is written in any case."""
    monkeypatch.setattr(performance, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(performance, "measured", lambda name: dict.fromkeys(COLUMNS, 1.0))
    monkeypatch.setattr(performance, "_program", lambda *_: None)
    tried = []

    def mesh(sizes):
        tried.append(sizes)
        if len(tried) == 3:
            raise KeyboardInterrupt
        return MESHES[f"mesh {sizes}"]

    monkeypatch.setattr(performance, "_mesh", mesh)
    with pytest.raises(KeyboardInterrupt):
        performance.write()
    assert "| 2 | 1 | 1 |" in (tmp_path / "docs/performance.md").read_text()
    performance.write()
    assert tried == [*performance.MESHES[:3], *performance.MESHES[2:]]
    assert set(json.loads((tmp_path / "docs/performance.json").read_text())) >= set(MESHES)


@pytest.mark.slow
def test_a_mesh_row():
    """Losses fall into place on one device: finite, one per step."""
    row = performance.mesh_row((1, 1, 1))
    assert len(row["losses"]) == performance.STEPS and all(0 < loss < 20 for loss in row["losses"])
    assert row["first_step_s"] > 0
