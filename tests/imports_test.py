"""Who may import whom, as the layers of the package are drawn: read from the import statements, nothing is run."""

import ast
import importlib
from pathlib import Path

import pytest
from absl import flags

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "smdlm"

# The tower, ground floor first. A module imports from floors below its own and, without a cycle, from its own; the
# longest prefix that names it is its floor.
FLOORS = [
    ["smdlm.buckets", "smdlm.files", "smdlm.command", "smdlm.memory", "smdlm.program", "smdlm.startup"],
    ["smdlm.mesh"],
    ["smdlm.ops"],
    ["smdlm.models.base"],
    ["smdlm.models.attention", "smdlm.models.layers"],
    ["smdlm.models"],
    ["smdlm.feedback.gates", "smdlm.feedback.mixers"],
    ["smdlm.data", "smdlm.diffusion", "smdlm.optimizer", "smdlm.softmask"],
    ["smdlm.full_softmask", "smdlm.feedback", "smdlm.readout"],
    ["smdlm.denoiser"],
    ["smdlm.objective", "smdlm.sampling"],
    ["smdlm.evaluate"],
    ["smdlm.io", "smdlm.meter", "smdlm.stop"],
    ["smdlm.train"],
    ["smdlm.config"],
    ["smdlm.convert", "smdlm.identity"],
    ["smdlm.build"],
    ["smdlm.describe", "smdlm.experiment"],
    ["smdlm.library"],
    ["smdlm"],
    ["smdlm.generation", "smdlm.score", "smdlm.study"],
    ["smdlm.main", "smdlm.tools"],
]
# What commands share lies at the bottom; the one thing that it needs from above is imported when it is asked for.
UPWARD = {("smdlm.command", "smdlm.config")}
WITHOUT_JAX = (
    "smdlm.buckets",
    "smdlm.files",
    "smdlm.command",
    "smdlm.program",
)  # mistakes on command lines are found before jax starts

# Libraries that only the named modules may know, so that they can be replaced there.
ONLY = {
    "orbax": {"smdlm.io.checkpoint", "smdlm.io.streamed"},
    "tensorstore": {"smdlm.io.streamed"},
    "ml_collections": {"smdlm.config", "smdlm.command"},
    "grain": {"smdlm.data"},
    "tokenizers": {"smdlm.data"},
    "jinja2": {"smdlm.data.chat"},
    "tensorflow_datasets": {"smdlm.data"},
    "tensorboardX": {"smdlm.io.writer"},
    "matplotlib": {"smdlm.io.plots"},
    "gcsfs": {"smdlm.buckets"},
    "s3fs": {"smdlm.buckets"},
    "etils": {"smdlm.buckets"},
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


def imports(name, nodes=ast.walk):
    """Dotted names a module imports anywhere, functions included; `from a import b` is a.b where that is a module.

    nodes: ast.iter_child_nodes finds only what is imported as soon as the module is.
    """
    for node in nodes(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def inside(name):
    """Modules of the package that a module imports, but for UPWARD."""
    found = {other for other in imports(name) if other.split(".")[0] == "smdlm"}
    return sorted(other for other in found if (name, other) not in UPWARD)


def floor(name):
    prefixes = {prefix: i for i, row in enumerate(FLOORS) for prefix in row}
    best = max((prefix for prefix in prefixes if name == prefix or name.startswith(prefix + ".")), key=len)
    assert best != "smdlm" or name == "smdlm", f"{name} has no floor: give it one in FLOORS"
    return prefixes[best]


def test_the_package_was_found():
    assert {"smdlm.softmask", "smdlm.train", "smdlm.main", "smdlm.models.dit"} <= set(MODULES)
    assert "smdlm.softmask" in inside("smdlm.denoiser") and "smdlm.command" in inside("smdlm.main")
    assert all((name in MODULES and other in imports(name)) for name, other in UPWARD)


@pytest.mark.parametrize("name", MODULES)
def test_nobody_imports_from_above(name):
    unknown = [other for other in inside(name) if other not in MODULES]
    assert not unknown, f"{name} imports {unknown}, which do not exist"
    wrong = [other for other in inside(name) if floor(other) > floor(name)]
    assert not wrong, f"{name} must not import {wrong}"


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


@pytest.mark.parametrize("library", ["grain", "matplotlib", "tensorflow_datasets", "pyarrow"])
def test_what_sampling_does_not_need_is_imported_where_it_is_used(library):
    """`smdlm.load("miniature")` to the first samples is a matter of seconds, and each of these takes half of one."""
    for name in MODULES:
        assert all(other.split(".")[0] != library for other in imports(name, ast.iter_child_nodes)), name


def test_nobody_outside_models_knows_a_model():
    """Others know the protocol and the table of names; a conversion knows the model of its own table of keys."""
    for name in MODULES:
        if name.startswith(("smdlm.models", "smdlm.convert.")):
            continue
        known = {other for other in inside(name) if other.startswith("smdlm.models.")}
        assert known <= {"smdlm.models.base"}, f"{name} must not import {sorted(known)}"
        for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "smdlm.models":
                assert {alias.name for alias in node.names} <= {"ADAPTERS", "MODELS", "Model", "base"}, name


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_command_lines_need_no_jax_to_find_mistakes(name):
    seen, open_modules = set(), [name]
    while open_modules:
        seen.add(module := open_modules.pop())
        for other in imports(module, ast.iter_child_nodes):
            assert other.split(".")[0] not in ("jax", "flax", "optax", "chex"), f"{name}: {module} imports {other}"
            if other in MODULES and other not in seen:
                open_modules.append(other)


def test_configs_import_ml_collections_only():
    for file in sorted((ROOT / "configs").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            known = ("ml_collections", "configs", "__future__")
            assert all(n.split(".")[0] in known for n in names), f"{file.name} imports {names}"


def test_importing_everything_defines_no_flag():
    """A notebook or another program that uses absl keeps its flags to itself."""
    for name in MODULES:
        if not name.endswith("__main__") and name != "smdlm.tools.performance":  # that one sets the platform
            importlib.import_module(name)
    ours = [flag for flag in flags.FLAGS if flags.FLAGS.find_module_defining_flag(flag).startswith("smdlm")]
    assert not ours, ours
