"""Who may import whom, as the layers of the package are drawn: read from the import statements, nothing is run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "smdlm"

# A module may import from the layers before its own and, without a cycle, from its own. The longest prefix counts.
LAYERS = [
    [
        *("smdlm", "smdlm.command", "smdlm.cpu", "smdlm.runtime", "smdlm.shard", "smdlm.kernels"),
        *("smdlm.softmask", "smdlm.diffusion", "smdlm.sampling.filters", "smdlm.models.layers"),
    ],
    ["smdlm.models", "smdlm.readout", "smdlm.denoiser", "smdlm.objective", "smdlm.sampling", "smdlm.sampling.policies"],
    [
        *("smdlm.sampling.loop", "smdlm.sampling.blocks", "smdlm.partition", "smdlm.state"),
        *("smdlm.data", "smdlm.writer", "smdlm.checkpoint", "smdlm.viewer"),
    ],
    ["smdlm.train", "smdlm.evaluate", "smdlm.convert"],
    ["smdlm.build", "smdlm.main", "smdlm.aot", "smdlm.bench", "smdlm.performance", "smdlm.convert.__main__"],
]
# Libraries that only the named modules may know, so that they can be replaced there.
ONLY = {
    "orbax": {"smdlm.checkpoint"},
    "ml_collections": {"smdlm.build", "smdlm.command", "smdlm.main", "smdlm.aot.__main__"},
    "grain": {"smdlm.data"},
    "tokenizers": {"smdlm.data"},
    "tensorflow_datasets": {"smdlm.data"},
    "tensorboardX": {"smdlm.writer"},
    "matplotlib": {"smdlm.writer"},
    "torch": set(),
}


def modules():
    """{dotted name: file}."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports(name):
    """Dotted names a module imports anywhere, functions included; `from a import b` is a.b where that is a module."""
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def inside(name):
    return sorted({other for other in imports(name) if other.split(".")[0] == "smdlm"})


def layer(name):
    best = max(
        (prefix for rows in LAYERS for prefix in rows if name == prefix or name.startswith(prefix + ".")), key=len
    )
    assert best != "smdlm" or name == "smdlm", f"{name} has no layer: give it one in LAYERS"
    return next(i for i, row in enumerate(LAYERS) if best in row)


def test_the_package_was_found():
    assert {"smdlm.softmask", "smdlm.train", "smdlm.main", "smdlm.models.dit"} <= set(MODULES)
    assert "smdlm.softmask" in inside("smdlm.denoiser") and "smdlm.cpu" in inside("smdlm.main")


@pytest.mark.parametrize("name", MODULES)
def test_nobody_imports_from_above(name):
    wrong = [other for other in inside(name) if other in MODULES and layer(other) > layer(name)]
    assert not wrong, f"{name} must not import {wrong}"
    unknown = [other for other in inside(name) if other not in MODULES]
    assert not unknown, f"{name} imports {unknown}, which do not exist"


def test_no_cycles():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in inside(name):
                if other != name:
                    visit(other)
            done.add(path.pop())

    for name in MODULES:
        visit(name)


@pytest.mark.parametrize("library", ONLY)
def test_libraries_stay_where_they_belong(library):
    for name in MODULES:
        if any(other.split(".")[0] == library for other in imports(name)):
            assert any(name == owner or name.startswith(owner + ".") for owner in ONLY[library]), name


def test_nobody_but_the_denoiser_and_build_knows_a_model():
    """Training, sampling and evaluation see a denoiser; only construction, conversion and the bench name the DiT."""
    for name in MODULES:
        if "smdlm.models.dit" in inside(name):
            assert name.split(".")[1] in ("build", "bench", "convert", "aot"), name


def test_configs_import_ml_collections_only():
    for file in sorted((ROOT / "configs").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert all(n.split(".")[0] in ("ml_collections", "configs", "__future__") for n in names), (
                file.name,
                names,
            )
