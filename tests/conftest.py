"""Micro models, data and assertions shared by the tests of the core."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path

# Before jax starts: the numbers below are compared in f32, which an accelerator's default matmul precision is not.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time of the tests is XLA compiling: half of that is for speed that programs of this size do not need, and
# what several tests and their child processes compile is compiled once. Another golden set may sit closer to the
# tolerances, so it sees programs compiled as users compile them.
if not os.environ.get("SMDLM_GOLDEN"):
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    quick += " --xla_cpu_multi_thread_eigen=false"  # products are tiny, and other tests run on the other cores
    # These emitters take most of the time of a compilation. Later versions end at a flag that they do not know.
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR") or tempfile.mkdtemp("_smdlm")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smdlm.denoiser import Denoiser
from smdlm.feedback.gates import EntropyGate
from smdlm.mesh.rules import MeshConfig, param_shardings, state_shardings
from smdlm.models.dit import DiT
from smdlm.optimizer import OptimizerConfig, init_state, make_optimizer
from smdlm.readout import Readout
from smdlm.softmask import SoftMask
from smdlm.train import make_train_step

V, MASK, B, L = 24, 23, 4, 8
ROOT = Path(__file__).parents[1]


_children = {}  # file of tests -> what its program on eight devices did


class Child:
    """A file of tests run as a program on eight devices: its status and what it wrote, once `done` is set."""

    def __init__(self, path):
        self.path, self.done, self.process, self.status = path, threading.Event(), None, None
        self.files = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")

    def run(self):
        command, (stdout, stderr) = [sys.executable, str(self.path)], self.files
        self.process = subprocess.Popen(command, env=environment(8), stdout=stdout, stderr=stderr)
        self.status = self.process.wait()
        self.done.set()


def pytest_runtestloop(session):
    """Such programs run one after another beside the other tests, from the moment at which those begin."""
    if session.config.option.collectonly:
        return
    paths = dict.fromkeys(item.path for item in session.items if "eight_devices" in item.fixturenames)
    _children.update((path, Child(path)) for path in paths)
    threading.Thread(target=lambda: [child.run() for child in _children.values()], daemon=True).start()


@pytest.fixture(scope="module")
def eight_devices(request):
    """(the last line that this file as a program wrote, parsed as JSON; its stderr)."""
    child = _children[request.path]
    assert child.done.wait(timeout=900), "the program on eight devices has not ended in fifteen minutes"
    for file in child.files:
        file.seek(0)
    stdout, stderr = (file.read() for file in child.files)
    assert child.status == 0, stderr[-3000:]
    return json.loads(stdout.splitlines()[-1]), stderr


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that wait for a program on eight devices are slow, and come last."""
    for item in items:
        if "eight_devices" in item.fixturenames:
            item.add_marker("slow")
    items.sort(key=lambda item: "eight_devices" in item.fixturenames)


def pytest_unconfigure():
    for child in _children.values():
        if child.process:
            child.process.kill()  # of an interrupted session; nothing if it has ended
    if os.environ["JAX_COMPILATION_CACHE_DIR"].endswith("_smdlm"):
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Every compiled program holds memory mappings, of which Linux allows a process 65,530: the programs of the whole
    suite are more than that, and the next one would crash inside the compiler."""
    yield
    if len(Path("/proc/self/maps").read_text().splitlines()) > 25_000:
        jax.clear_caches()


def environment(devices):
    """Of a child process with so many CPU devices, which finds the package and the tests' helpers."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


# The paper's gate starts shut (scale 1e-6), which would hide what feedback does from every test.
SOFTMASK = SoftMask(k=3, gate=EntropyGate(scale=0.6, centre=-2.0, steepness=2.0))
READOUT = Readout(k=3, chunk=5)


def make_denoiser(softmask=SOFTMASK, *, vocab=V, **model):
    """A DiT of width 16 and depth 2; the mask is the last id of the vocabulary."""
    sizes = {"width": 16, "depth": 2, "heads": 2, "cond": 8, "dropout": 0.0, "vocab_multiple": 1}
    return Denoiser(DiT(vocab_size=vocab, **{**sizes, **model}), vocab, vocab - 1, softmask)


def make_params(denoiser, seed=0, noise=0.4):
    """Noise on every leaf of the backbone (norms around 1): at the real start head and adaLN are zero, which hides
    mistakes. Drawn by NumPy from the shapes alone, so that no test pays for compiling the initialisation."""
    params = nn.meta.unbox(jax.eval_shape(denoiser.init, jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        return jnp.asarray((path[-1].key == "scale") + noise * rng.normal(size=x.shape), jnp.float32)

    backbone = jax.tree_util.tree_map_with_path(leaf, params["backbone"])
    omega = nn.meta.unbox(denoiser.init_omega(jax.random.key(0)))
    matrices = {name: x for name, x in omega.items() if x.ndim}
    return {"backbone": backbone, "softmask": {**omega, **jax.tree_util.tree_map_with_path(leaf, matrices)}}


def make_batch(batch=B, length=L, vocab=V, seed=0, valid=None):
    """Tokens without the mask id; `valid` rows, all by default."""
    tokens = np.random.default_rng(seed).integers(0, vocab - 1, (batch, length)).astype(np.int32)
    return {"tokens": jnp.asarray(tokens), "valid": jnp.ones(batch, bool) if valid is None else jnp.asarray(valid)}


def make_training(objective, *, steps=100, accumulate=1, seed=0, mesh=None, **optimizer):
    """(jitted train step, function that makes a fresh state) of an objective; keywords are OptimizerConfig's."""
    config = OptimizerConfig(**{"warmup": 0, "lr": 1e-2, **optimizer})
    mesh = MeshConfig().make() if mesh is None else mesh
    transform = make_optimizer(config, steps, objective.denoiser.model.matrices())
    boxed = jax.eval_shape(objective.denoiser.init, jax.random.key(0))
    abstract = jax.eval_shape(lambda p: init_state(p, transform), nn.meta.unbox(boxed))
    shardings = state_shardings(mesh, abstract, param_shardings(mesh, boxed))
    step = make_train_step(
        objective,
        transform,
        ema_decay=config.ema_decay,
        accumulate=accumulate,
        seed=seed,
        mesh=mesh,
        shardings=shardings,
    )

    def fresh(seed=0):
        return jax.device_put(init_state(make_params(objective.denoiser, seed), transform), shardings)

    return step, fresh


def assert_close(got, wanted, rtol=1e-5, atol=1e-6):
    """Two pytrees of the same structure, leaf by leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        message = jax.tree_util.keystr(path)
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=rtol, atol=atol, err_msg=message)


def assert_identical(got, wanted):
    """Two pytrees, bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes(), jax.tree_util.keystr(path)


def same(a, b):
    """Whether two pytrees of the same structure are bit for bit equal."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
