"""Parity with the public PyTorch code: every array of the golden set in $SMDLM_GOLDEN (default tests/golden).

Sizes, ids, cases and parameters are read from the files, so another set of other sizes runs unchanged; what a set does
not have is named in the last line. Tolerances are those of the set's README (distance of the f32 reference from a
float64 re-implementation), twice that where two f32 programs meet at the last bit; they grow with arrays that hold
numbers beyond 16, as rounding does. It is right to change one only if the reference changes. A new sampler is one entry
of SAMPLERS.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smdlm.convert import __main__ as convert
from smdlm.convert import files, mdlm
from smdlm.denoiser import Denoiser
from smdlm.diffusion import LogLinear, TimeSampler
from smdlm.full_softmask import FullSoftMask
from smdlm.models.base import Head
from smdlm.models.dit import Block, DiT, SigmaMap
from smdlm.objective import NextToken, SoftMaskedDiffusion
from smdlm.ops.filters import Filters
from smdlm.ops.vocab import neg_entropy
from smdlm.optimizer import OptimizerConfig, init_state, make_optimizer, update_ema
from smdlm.readout import Draw, Readout, exclude
from smdlm.sampling.loop import Sampler
from smdlm.sampling.policies import (
    Ancestral,
    Cap,
    Confidence,
    ForwardBackward,
    Loop,
    Policy,
    Rescale,
    Times,
    linear_times,
)
from smdlm.softmask import EntropyGate, Feedback, SoftMask, summarize

TOLERANCES = {  # group: largest absolute difference; gradients: relative to the largest entry of the tensor
    "logits": 1.3e-5,
    "activations": 1.3e-5,
    "SUBS": 3e-6,  # twice the README's: one ulp at 16 is 1.9e-6
    "soft mask": 3e-7,
    "soft-mask parameters": 1e-6,
    "soft-mask embeddings": 1.5e-6,
    "loss": 1e-4,
    "log-probs of both passes": 5e-5,
    "gradients": 1e-5,
    "noise": 1e-7,
    "sampler masses": 1.5e-7,
    "nucleus": 3e-7,
    "trajectory tokens": 0,
    "trajectory log-probs": 5e-5,
    "EMA": 1e-6,
    "AdamW": 1e-5,
    "AR": 1.3e-5,
    "AR tokens": 0,
    "conversion": 0,
}


@dataclasses.dataclass(frozen=True)
class Replay:
    """How a sampler of the golden set runs here.

    policy: makes it from the stored eta, t_on, t_off, alpha_on. carry_in: (policy, canvas, conf [B, L]) -> its carry;
    carry_out: carry -> conf [B, L], for samplers that carry a confidence.
    A uniform u commits, or re-masks, where it is below the policy's chance.
    """

    policy: Callable[[dict[str, float]], Policy]
    carry_in: Callable[[Policy, Any, Any], Any] | None = None
    carry_out: Callable[[Any], Any] | None = None


SAMPLERS: dict[str, Replay] = {
    "mdlm": Replay(lambda p: Ancestral()),
    "remdm-cap": Replay(lambda p: Cap(p["eta"])),
    "remdm-loop": Replay(lambda p: Loop(p["eta"], p["t_on"], p["t_off"], p["alpha_on"])),
    "remdm-rescale": Replay(lambda p: Rescale(p["eta"])),
    "remdm-conf": Replay(lambda p: Confidence(), lambda policy, canvas, conf: jnp.asarray(conf), lambda carry: carry),
    "forward-backward": Replay(lambda p: ForwardBackward()),
}


def sampler(name: str) -> Replay:
    if name not in SAMPLERS:
        pytest.fail(
            f"got golden arrays of {name!r}, wanted a policy for them: add it to SAMPLERS in this file", pytrace=False
        )
    return SAMPLERS[name]


# ----------------------------------------------------------------------------------------------- arrays and bookkeeping


def find_folder() -> Path:
    root = Path(os.environ.get("SMDLM_GOLDEN") or Path(__file__).parent / "golden")
    return root / "mdlm" if (root / "mdlm").is_dir() else root


FOLDER = find_folder()
FILES = sorted(path.name for path in FOLDER.glob("*.npz"))
CHECKPOINTS = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".ckpt", ".safetensors"))
USED: dict[tuple[str, str], str] = {}  # (file, array) -> 'input' or 'compared'
ROWS: dict[str, dict[str, Any]] = {}  # group -> counts
FAILURES: list[str] = []  # of the test that runs
MISSING: set[str] = set()  # files that the set does not have


def need(*names: str) -> Path:
    """The first of these files that the set has; without any the test is skipped and the last line says so."""
    for name in names:
        if (FOLDER / name).exists():
            return FOLDER / name
    MISSING.add(names[0])
    pytest.skip(f"the set has no {' or '.join(names)}")


class Arrays:
    """One npz; remembers which of its arrays were used."""

    def __init__(self, name: str):
        self.name = name
        with np.load(need(name)) as data:
            self.data = {key: data[key] for key in data.files}

    def __contains__(self, key: str) -> bool:
        return key in self.data

    def __getitem__(self, key: str) -> np.ndarray:
        USED.setdefault((self.name, key), "input")
        value = self.data[key]
        return value.astype(np.int32) if value.dtype == np.int64 and value.ndim else value

    def matches(self, pattern: str) -> list[re.Match]:
        """Full matches of the names, in order."""
        return [m for m in (re.fullmatch(pattern, key) for key in self.data) if m]

    def check(self, group: str, key: str, got: Any, where: Any = True, scale: float = 1.0) -> None:
        """|got - stored| <= tolerance of the group * scale at `where`."""
        wanted, got = self[key], np.asarray(got)
        USED[self.name, key] = "compared"
        assert got.shape == wanted.shape, f"{self.name} {key}: got shape {got.shape}, wanted {wanted.shape}"
        compare(group, f"{self.name} {key}", got, wanted, where, scale)


def compare(group: str, name: str, got: Any, wanted: Any, where: Any = True, scale: float = 1.0) -> None:
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    same = (got == wanted) | ~np.broadcast_to(where, wanted.shape)  # equal infinities differ by NaN
    difference = np.where(same, 0.0, np.abs(np.where(same, 0.0, got) - np.where(same, 0.0, wanted)))
    # Infinities, and SUBS's -1e6 that stands for one, are no measure of the size of the numbers.
    size = np.max(np.abs(wanted), initial=0.0, where=np.isfinite(wanted) & (np.abs(wanted) < 1e5))
    worst = float(difference.max(initial=0.0)) / (scale * max(1.0, size / 16))
    row = ROWS.setdefault(group, {"cases": set(), "arrays": 0, "worst": 0.0, "failed": 0})
    row["cases"].add(os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0])
    row["arrays"] += 1
    row["worst"] = max(row["worst"], worst) if worst == worst else float("nan")
    fits = worst <= TOLERANCES[group]
    row["failed"] += not fits
    if not fits:  # raised at the end of the test, so that its other arrays are compared, too
        FAILURES.append(f"{name}: got a difference of {worst:.3g}, wanted at most {TOLERANCES[group]:.3g} ({group})")


@functools.cache
def arrays(name: str) -> Arrays:
    return Arrays(name)


class Bookkeeping:
    """Pytest hooks: every difference of a test in one failure; the table and its closing line at the end of the run."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        if item.path != Path(__file__):
            return (yield)
        FAILURES.clear()
        result = yield
        assert not FAILURES, "\n".join(FAILURES)
        return result

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter):
        line = terminalreporter.write_line
        line(f"\n{'group':28}{'cases':>7}{'arrays':>8}{'worst':>12}{'tolerance':>12}")
        for group, row in ROWS.items():
            numbers = f"{len(row['cases']):7}{row['arrays']:8}{row['worst']:12.3g}{TOLERANCES[group]:12.3g}"
            line(f"{group:28}{numbers}" + (f"  {row['failed']} FAILED" if row["failed"] else ""))

    def pytest_unconfigure(self, config):
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        reports = reporter.stats.get("failed", []) + reporter.stats.get("error", [])
        failed = sum(Path(report.fspath).name == Path(__file__).name for report in reports)
        compared = sum(row["arrays"] for row in ROWS.values())
        reporter.write_line(
            f"{compared} arrays compared in {len(ROWS)} groups: {sum(row['failed'] for row in ROWS.values())} differ, "
            f"{failed} tests failed, {len(unused())} stored arrays not used, "
            f"files the set does not have: {', '.join(sorted(MISSING)) or 'none'}"
        )


@pytest.fixture(scope="module", autouse=True)
def bookkeeping(request):
    request.config.pluginmanager.register(Bookkeeping())


def unused() -> list[str]:
    return [f"{name} {key}" for name in FILES for key in arrays(name).data if (name, key) not in USED]


# ------------------------------------------------------------------------------------------------------------- models


@dataclasses.dataclass(frozen=True)
class Reference:
    """A converted checkpoint behind our own objects; its vocabulary is padded, and the padding must not show."""

    denoiser: Denoiser
    params: Any
    ema: Any
    readout: Readout
    ema_decay: float

    @property
    def vocab(self) -> int:
        return self.denoiser.vocab_size

    @property
    def config(self) -> Any:
        return self.denoiser.model

    @property
    def backbone(self) -> Any:
        return self.params["backbone"]

    @property
    def table(self) -> jax.Array:
        return self.denoiser.model.table(self.backbone)[: self.vocab]

    def run(self, x: jax.Array, cond: Any = None) -> np.ndarray:
        """Embeddings [B, L, D] -> raw logits [B, L, V], the mask's included."""
        hidden = forward(self.denoiser.model, self.backbone, x, cond)
        return self.denoiser.model.head(self.backbone).logits(hidden)[..., : self.vocab]

    def log_probs(self, params: Any, hidden: jax.Array, canvas: np.ndarray) -> np.ndarray:
        """[B, L, V]: our prediction at masked positions, the token itself elsewhere (SUBS)."""
        return subs(self.readout.log_probs(self.denoiser.head(params), hidden)[..., : self.vocab], canvas, self)


@functools.partial(jax.jit, static_argnums=0)
def forward(model: DiT, backbone, x, cond) -> jax.Array:
    return model.apply({"params": backbone}, x, cond)


@functools.partial(jax.jit, static_argnums=0)
def denoise(denoiser: Denoiser, params, tokens, feedback=None) -> jax.Array:
    return denoiser(params, tokens, feedback)


@functools.partial(jax.jit, static_argnums=(0, 1))
def remember_prediction(denoiser: Denoiser, readout: Readout, params, hidden, masked) -> Feedback:
    return denoiser.softmask.attach(readout.feedback(denoiser.head(params), hidden, masked), hidden)


def subs(log_probs: jax.Array, canvas: np.ndarray, reference: Reference) -> np.ndarray:
    known = np.where(np.arange(reference.vocab) == canvas[..., None], 0.0, -1e6)
    return np.where((canvas == reference.denoiser.mask_id)[..., None], log_probs, known)


def load_reference(name: str, kind: str, mask_id: int, softmask: SoftMask | None) -> Reference:
    source, shadow = files.load(need(f"{name}.ckpt", f"{name}.safetensors")), None
    if kind == "mdlm" and source.shadow is None:
        shadow = files.load(need("ema.ckpt", "ema.safetensors"))
    made = mdlm.import_source(source, kind, shadow=shadow, softmask=softmask)
    denoiser = Denoiser(DiT(made.config), made.config.vocab_size, mask_id, softmask)
    params, ema = jax.tree.map(jnp.asarray, (made.params, made.ema))
    decay = (made.meta["convert"]["ema"] or {}).get("decay", 0.0)
    # A small odd chunk, so that sweeps have several steps and a padded last one.
    return Reference(denoiser, params, ema, Readout(k=softmask.k if softmask else 1, chunk=17), decay)


@pytest.fixture(scope="module")
def diffusion() -> Reference:
    stored = arrays("loss.npz")
    k = stored["pass2_indices"].shape[-1] - 1
    return load_reference("mdlm", "mdlm", int(stored["mask_index"]), SoftMask(k=k))


@pytest.fixture(scope="module")
def full() -> Reference:
    """The same weights under the full-distribution operator with its temperature."""
    return load_reference("mdlm", "mdlm", int(arrays("loss.npz")["mask_index"]), FullSoftMask(chunk=17))


@pytest.fixture(scope="module")
def autoregressive() -> Reference:
    return load_reference("ar", "ar", int(arrays("ar.npz")["mask_index"]), None)


def not_mask(reference: Reference) -> np.ndarray:
    """[V]: all columns but the mask's, which holds -1e6 there (an f32 ulp of 0.06) and -1e30 here."""
    return np.arange(reference.vocab) != reference.denoiser.mask_id


# ----------------------------------------------------------------------------------------------------------- backbone


@pytest.mark.parametrize("tag", ["sigma0", "sigma"])
def test_backbone(diffusion, tag):
    stored = arrays("backbone.npz")
    assert int(stored["mask_index"]) == diffusion.denoiser.mask_id
    sigma, tokens = stored[tag], stored["xt"]
    assert stored["x0"].shape == tokens.shape
    ids = diffusion.table[tokens]
    sparse = jnp.einsum("blk,blkd->bld", stored["sparse_probs"], diffusion.table[stored["sparse_indices"]])
    dense = stored["dense_probs"] @ diffusion.table
    stored.check("logits", f"logits_{tag}", diffusion.run(ids, sigma))
    stored.check("logits", f"logits_sparse_{tag}", diffusion.run(sparse, sigma))
    stored.check("logits", f"logits_dense_{tag}", diffusion.run(dense, sigma))
    stored.check("activations", "embed_sparse", sparse)
    stored.check("activations", "embed_dense", dense)
    stored.check("activations", f"act_{tag}_embed", ids)

    config = diffusion.config
    cond = SigmaMap(config.cond, jnp.float32).apply({"params": diffusion.backbone["sigma_map"]}, sigma)
    stored.check("activations", f"act_{tag}_sigma_map", cond)
    check_blocks(stored, "activations", f"act_{tag}_block", diffusion, ids, jax.nn.silu(cond), None)
    if tag == "sigma0":  # None stands for sigma 0; shorter inputs; the denoiser itself
        hidden = denoise(diffusion.denoiser, diffusion.params, tokens)
        logits = diffusion.denoiser.model.head(diffusion.backbone).logits(hidden)[..., : diffusion.vocab]
        stored.check("logits", "logits_sigma0", logits)
        stored.check("logits", "logits_short_sigma0", diffusion.run(diffusion.table[stored["xt_short"]]))


@functools.partial(jax.jit, static_argnums=0)
def run_block(config, layer, x, cond, mask) -> jax.Array:
    return Block(config, deterministic=True).apply({"params": layer}, x, cond, jnp.arange(x.shape[1]), mask, None)[0]


def check_blocks(stored, group, prefix, reference, x, cond, mask):
    """Every block's output, from the input of the first."""
    for i in range(reference.config.depth):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], reference.backbone["blocks"])
        x = run_block(reference.config, layer, x, cond, mask)
        stored.check(group, f"{prefix}{i}", x)


# --------------------------------------------------------------------------------------------------- SUBS and soft mask


def test_subs(diffusion):
    stored = arrays("subs.npz")
    assert int(stored["mask_index"]) == diffusion.denoiser.mask_id and stored["neg_infinity"] == -1e6
    # Logits as the product of hidden states and an identity: what remains is our exclusion and normalisation.
    head = exclude(
        Head(jnp.eye(diffusion.vocab), jnp.zeros(diffusion.vocab)), diffusion.vocab, diffusion.denoiser.mask_id
    )
    tags = [m[1] for m in stored.matches("logits_(.*)")]
    cases = [(f"logits_{tag}", f"logp_{tag}", "xt") for tag in tags]
    cases += [("logits_sigma0", "logp_allmask", "xt_allmask"), ("logits_sigma0", "logp_nomask_x0", "x0")]
    for logits, log_probs, canvas in cases:
        got = subs(diffusion.readout.log_probs(head, jnp.asarray(stored[logits])), stored[canvas], diffusion)
        stored.check("SUBS", log_probs, got, where=not_mask(diffusion))


@pytest.fixture(scope="module")
def omega():
    stored = arrays("softmask.npz")
    return {ours: jnp.asarray(stored[name.split(".")[1]]) for name, ours in mdlm.OMEGA.items()}


def test_softmask_parameters(omega):
    stored = arrays("softmask.npz")
    args = [float(x) for x in stored["init2_args"]]
    cases = {
        "": omega,
        "default_init_": FullSoftMask().init(),
        "init2_": FullSoftMask(gate=EntropyGate(*args[:3]), temperature=args[3]).init(),
    }
    for prefix, raw in cases.items():
        values = EntropyGate().values(raw)
        names = {"scale": values["omega_s"], "centre": values["omega_b"], "steepness": values["omega_a"]}
        names["temperature"] = jax.nn.softplus(raw["raw_temperature"]) + 1e-6
        names |= {name.split(".")[1]: raw[ours] for name, ours in mdlm.OMEGA.items()}
        for name, value in names.items():
            stored.check("soft-mask parameters", prefix + name, value, scale=max(1.0, abs(float(value))))


def sparse_form(feedback: Feedback, lam: Any, canvas: np.ndarray, mask_id: int) -> tuple[np.ndarray, np.ndarray]:
    """The reference's (indices, probs) [B, L, K + 1] of our feedback: the token itself first."""
    masked = (canvas == mask_id)[..., None]
    pi = feedback.probs / feedback.probs.sum(-1, keepdims=True)
    indices = np.concatenate([canvas[..., None], np.where(masked, feedback.ids, 0)], -1)
    lam = np.asarray(lam)[..., None]
    return indices, np.concatenate([np.where(masked, 1 - lam, 1.0), np.where(masked, lam * pi, 0.0)], -1)


def test_softmask_topk(diffusion, omega):
    stored = arrays("softmask.npz")
    mask_id, canvas = int(stored["mask_index"]), stored["ids"]
    # Rows made by hand (ties, one-hot) are not normalised; what a readout gives is.
    log_p = jax.nn.log_softmax(jnp.asarray(stored["log_p"]))
    untied, masked = ~stored["tie_ambiguous"], canvas == mask_id
    entropy = neg_entropy(log_p)
    stored.check(
        "soft mask", "neg_entropy_T1", entropy, scale=10
    )  # up to ln V: the ulp is ten times that of a probability
    lam = np.where(masked, EntropyGate()(omega, entropy), 0.0)
    stored.check("soft mask", "lambda_T1", lam)
    stored.check("soft-mask embeddings", "topk_emb_xt_only", diffusion.table[canvas])
    sizes = [int(m[1]) for m in stored.matches(r"topk(\d+)_indices")]
    assert sizes
    for k in sizes:
        feedback = summarize(log_p, jnp.asarray(masked), k)
        indices, probs = sparse_form(feedback, lam, canvas, mask_id)
        embed = SoftMask(k)(omega, diffusion.table, None, jnp.asarray(canvas), feedback, mask_id)
        dense = np.zeros(log_p.shape)
        for j in range(k + 1):
            np.put_along_axis(
                dense,
                indices[..., j : j + 1],
                np.take_along_axis(dense, indices[..., j : j + 1], -1) + probs[..., j : j + 1],
                -1,
            )
        stored.check("soft mask", f"topk{k}_indices", indices, where=untied[..., None])
        stored.check("soft mask", f"topk{k}_probs", probs)
        stored.check("soft mask", f"topk{k}_dense", dense, where=untied[..., None])
        stored.check("soft-mask embeddings", f"topk{k}_embed", embed, where=untied[..., None])
        for row in np.nonzero(~masked.any(1))[0][:1]:  # a row without a mask, alone
            alone = canvas[row : row + 1]
            indices, probs = sparse_form(
                Feedback.none(*alone.shape, k).replace(probs=jnp.ones((*alone.shape, k))), 0, alone, mask_id
            )
            stored.check("soft mask", f"topk{k}_nomask_indices", indices)
            stored.check("soft mask", f"topk{k}_nomask_probs", probs)


def test_softmask_temperature(diffusion, omega):
    stored = arrays("softmask.npz")
    mask_id, canvas = int(stored["mask_index"]), stored["ids"]
    log_p, masked = jnp.asarray(stored["log_p"]), canvas == mask_id
    operator, one = FullSoftMask(chunk=17), jnp.eye(diffusion.vocab)
    mixed, entropy = operator.mix(omega, one, log_p)
    lam = np.where(masked, operator.gate(omega, entropy), 0.0)
    stored.check("soft mask", "neg_entropy_temp", entropy, scale=10)
    stored.check("soft mask", "lambda_temp", lam)
    stored.check("soft mask", "temp_p_out", (1 - lam)[..., None] * one[canvas] + lam[..., None] * mixed)
    # The operator itself, whose logits are the product of the hidden states and the head.
    feedback = summarize(log_p, jnp.asarray(masked), 1).replace(hidden=log_p)
    head = Head(one, jnp.zeros(diffusion.vocab))
    embed = operator(omega, diffusion.table, head, jnp.asarray(canvas), feedback, mask_id)
    stored.check("soft-mask embeddings", "temp_embed", embed)


# --------------------------------------------------------------------------------------------------------------- loss


def stored_times(key: Any, batch: int) -> jax.Array:
    return jnp.asarray(arrays("loss.npz")["t"])


def example(reference: Reference, valid: np.ndarray) -> tuple[SoftMaskedDiffusion, Any]:
    """(objective, its corrupted batch) with the stored t and the stored uniforms in place of random ones."""
    stored = arrays("loss.npz")
    objective = SoftMaskedDiffusion(reference.denoiser, reference.readout, p_sm=0.5, times=stored_times)
    with mock.patch("jax.random.uniform", lambda *args, **kwargs: jnp.asarray(stored["uniform_noise"])):
        batch = {"tokens": jnp.asarray(stored["x0"]), "valid": jnp.asarray(valid)}
        return objective, objective.corrupt(jax.random.key(0), batch)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(objective, params, batch, feedback):
    return jax.value_and_grad(objective, has_aux=True)(params, batch, feedback, None)


def loss_cases() -> list[str]:
    """Their names say what they are: binary or sm, with _pad for padded rows, _temp for the learned temperature."""
    return [m[1] for m in arrays("loss.npz").matches("(.*)_num_tokens")] if "loss.npz" in FILES else []


@pytest.mark.parametrize("case", loss_cases())
def test_loss(diffusion, full, case):
    stored = arrays("loss.npz")
    reference = full if "temp" in case else diffusion
    valid = stored["valid_pad" if "pad" in case else "valid"]
    objective, batch = example(reference, valid > 0)
    stored.check("noise", "xt", batch.canvas)
    (loss, nll), grads = loss_and_gradients(objective, reference.params, batch, not case.startswith("binary"))
    stored.check("loss", f"{case}_loss", loss)
    stored.check("loss", f"{case}_nlls_sum", loss * valid.sum(), scale=float(valid.sum()))
    stored.check("loss", f"{case}_num_tokens", 1 / np.max(batch.weights * stored["t"][:, None]))
    if f"{case}_nll_tok" in stored:
        stored.check("loss", f"{case}_nll_tok", nll * objective.schedule.weight(stored["t"])[:, None])
    named = mdlm.from_tree(grads["backbone"], reference.config)
    named |= {name: grads["softmask"].get(ours, jnp.zeros(())) for name, ours in mdlm.OMEGA.items()}
    for match in stored.matches(f"{case}_grad_((backbone|tran_head)[.].*)"):
        # omega's gradients are sums of terms of one size, so they share a scale.
        peers = stored.matches(f"{case}_grad_tran_head.*") if match[2] == "tran_head" else [match]
        size = max(float(np.abs(stored[m[0]]).max()) for m in peers)
        stored.check("gradients", match[0], named[match[1]], scale=size or 1.0)
    stored.check(
        "gradients",
        f"{case}_grad_global_norm",
        optax.global_norm(grads),
        scale=float(stored[f"{case}_grad_global_norm"]),
    )


def test_both_passes(diffusion, full):
    stored = arrays("loss.npz")
    canvas = stored["xt"]
    tokens, masked = jnp.asarray(canvas), jnp.asarray(canvas == diffusion.denoiser.mask_id)
    for reference, name in ((diffusion, "pass2_log_p"), (full, "sm_temp_pass2_log_p")):
        denoiser, params = reference.denoiser, reference.params
        hidden = denoise(denoiser, params, tokens)
        feedback = remember_prediction(denoiser, reference.readout, params, hidden, masked)
        second = denoise(denoiser, params, tokens, feedback)
        where = not_mask(reference)
        stored.check(
            "log-probs of both passes", "pass1_log_p", reference.log_probs(params, hidden, canvas), where=where
        )
        stored.check("log-probs of both passes", name, reference.log_probs(params, second, canvas), where=where)
        if reference is diffusion:
            lam = denoiser.softmask.gate(params["softmask"], feedback.neg_entropy)
            indices, probs = sparse_form(feedback, lam, canvas, denoiser.mask_id)
            stored.check("log-probs of both passes", "pass2_indices", indices)
            stored.check("log-probs of both passes", "pass2_probs", probs)


def test_noise(diffusion):
    stored = arrays("loss.npz")
    assert int(stored["mask_index"]) == diffusion.denoiser.mask_id
    schedule = LogLinear()
    with mock.patch("jax.random.uniform", lambda *args, **kwargs: jnp.asarray(stored["antithetic_u"])):
        t = TimeSampler("stratified")(jax.random.key(0), len(stored["antithetic_u"]))
    stored.check("noise", "antithetic_t", t)
    stored.check("noise", "noise_alpha_grid", schedule.alpha(stored["noise_t_grid"]))
    stored.check("noise", "alpha_t", schedule.alpha(stored["t"]))
    stored.check("noise", "dalpha_t", schedule.alpha(1.0) - schedule.alpha(0.0))
    # MDLM computes sigma = -log alpha and then zeroes it (no time conditioning).
    stored.check("noise", "sigma", -jnp.log(schedule.alpha(stored["t"])), scale=float(stored["sigma"].max()))


# ----------------------------------------------------------------------------------------------------------- samplers


@functools.partial(jax.jit, static_argnums=0)
def chances(policy: Policy, canvas, masked, draw: Draw, times: Times, carry) -> tuple[jax.Array, jax.Array]:
    """(chance to commit, chance to re-mask) [B, L], found by bisection on the uniform that is handed to the policy."""

    def bisect(which: int) -> jax.Array:
        hit = lambda u: policy(u, canvas, masked, draw, times, carry)[which]  # noqa: E731

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) / 2
            return jnp.where(hit(middle), middle, low), jnp.where(hit(middle), high, middle)

        zeros = jnp.zeros(canvas.shape)
        _, high = jax.lax.fori_loop(0, 60, halve, (zeros, zeros + 1))
        return jnp.where(hit(zeros), high, 0.0)

    return jnp.where(masked, bisect(0), 0.0), jnp.where(masked, 0.0, bisect(1))


def mixture(commit, remask, probs, canvas, mask_id) -> np.ndarray:
    """q(x_s) [B, L, V] f64 of the chances and p(x_0) [B, L, V]: what one step draws from."""
    commit, remask = np.float64(commit)[..., None], np.float64(remask)[..., None]
    ids = np.arange(probs.shape[-1])
    to_mask, to_token = ids == mask_id, ids == canvas[..., None]
    masked = np.where(to_mask, 1 - commit, commit * probs)
    return np.where((canvas == mask_id)[..., None], masked, np.where(to_mask, remask, (1 - remask) * to_token))


def sampler_cases() -> list[tuple[str, str]]:
    """(case, sampler) of samplers.npz, among them the all-masked confidence case."""
    names = arrays("samplers.npz").data["case_names"].tolist() if "samplers.npz" in FILES else []
    return [(name, re.match("(.*?)_t[0-9]", name)[1]) for name in names]


summarized = jax.jit(summarize, static_argnums=2)


def draw_of(probs: np.ndarray, tokens: np.ndarray, canvas: np.ndarray, mask_id: int) -> Draw:
    """A draw of the given tokens from stored p(x_0)."""
    log_p = jnp.log(jnp.maximum(probs, 1e-30))
    chosen = jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0]
    masked = jnp.asarray(canvas == mask_id)
    return Draw(jnp.asarray(tokens), jnp.where(masked, chosen, 0.0), summarized(log_p, masked, 2))


@pytest.mark.parametrize("case, name", sampler_cases())
def test_sampler_masses(case, name):
    replay, stored = sampler(name), arrays("samplers.npz")
    value = {key: float(stored[f"{case}__{key}"]) for key in ("t", "dt", "eta", "t_on", "t_off", "alpha_on")}
    policy, mask_id = replay.policy(value), int(stored["mask_index"])
    t = np.float32(value["t"])
    times = Times(jnp.asarray(t), jnp.asarray(t - np.float32(value["dt"])))
    compare("noise", f"{case} alpha_t", 1 - times.t, stored[f"{case}__alpha_t"])
    compare("noise", f"{case} alpha_s", 1 - times.s, stored[f"{case}__alpha_s"])
    assert np.allclose(np.exp(stored["log_p_x0"]), stored["p_x0"], atol=1e-6)
    got = check_masses(stored, policy, replay, times, f"{{}}__{case}__q_xs", stored["p_x0"], stored["x"], mask_id)
    if replay.carry_in:
        check_confidence(stored, policy, replay, times, case, mask_id, got)


def check_masses(stored, policy, replay, times, pattern, probs, canvas, mask_id, conf=None) -> np.ndarray:
    """Compares q(x_s) with the arrays of that name pattern; returns ours."""
    keys = [key for key in (pattern.format("ibm"), pattern.format("remdm"), pattern) if key in stored]
    assert keys, f"got no array {pattern}, wanted one"
    draw = draw_of(probs, np.argmax(probs, -1).astype(np.int32), canvas, mask_id)
    if conf is None and replay.carry_in:
        conf = stored["conf_in"]
    carry = replay.carry_in(policy, canvas, conf) if replay.carry_in else policy.init(jnp.asarray(canvas == mask_id))
    masked = canvas == mask_id
    commit, remask = chances(policy, jnp.asarray(canvas), jnp.asarray(masked), draw, times, carry)
    for key in keys:
        # MDLM's masses add up to t, the others' to one (up to rounding of p, which the median passes over).
        total = np.median(stored[key][masked].sum(-1, dtype=np.float64))
        # MDLM's formula also runs on known tokens, which its caller then keeps.
        where = masked[..., None] if not np.asarray(remask).any() else True
        got = mixture(commit, remask, probs, canvas, mask_id) * total
        stored.check("sampler masses", key, got, where=where)
    return got


def check_confidence(stored, policy, replay, times, case, mask_id, masses) -> None:
    """The confidences after the step whose outcome is stored; the half-precision twin; the all-masked first step."""
    canvas, after, conf = stored["x"], stored["conf_xs_out"], stored["conf_in"]
    draw = draw_of(stored["p_x0"], after, canvas, mask_id)
    u = jnp.where(canvas != after, 0.0, 1 - 2.0**-24)  # 0 commits or re-masks
    carry = replay.carry_in(policy, canvas, conf)
    *_, carry = policy(u, jnp.asarray(canvas), jnp.asarray(canvas == mask_id), draw, times, carry)
    stored.check("sampler masses", f"{case}__conf_out", replay.carry_out(carry))
    # Its autocast twin in bfloat16, which has 8 bits: ours, in f32, at that precision.
    twin, bits = f"remdm__{case}__bf16__q_xs", 2.0**-7 / TOLERANCES["sampler masses"]
    if twin in stored:
        assert str(stored[f"{twin}_dtype"]) == "torch.bfloat16"
        stored.check("sampler masses", f"{case}__bf16__conf_out", replay.carry_out(carry), scale=bits)
        stored.check("sampler masses", twin, masses, scale=bits)
    if "remdm-conf_first__x" in stored and times.t == 1:
        first = stored["remdm-conf_first__x"]
        none = np.full(first.shape, -np.inf, np.float32)
        check_masses(
            stored, policy, replay, times, "remdm__remdm-conf_first__q_xs", stored["p_x0"], first, mask_id, none
        )


def test_sampler_lists():
    """The reference's two code bases agree on what both have."""
    stored = arrays("samplers.npz")
    names = set(stored["case_names"].tolist()) | {m[1] for m in stored.matches("(nucleus_.*)__p_x0")}
    assert set(stored["remdm_bit_identical_to_ibm"].tolist()) <= names and not stored["remdm_different_from_ibm"].size


def test_nucleus(diffusion):
    stored = arrays("samplers.npz")
    canvas, mask_id = stored["x"], int(stored["mask_index"])
    matches = stored.matches(r"nucleus_([0-9.]+)__p_x0")
    assert matches
    for match in matches:
        filters = Filters(top_p=float(match[1]), top_p_rule="reference")
        log_p = jnp.asarray(stored["log_p_x0"]).reshape(-1, diffusion.vocab)
        probs = filters.probs(log_p)
        probs = (probs / probs.sum(-1, keepdims=True)).reshape(*canvas.shape, -1)
        stored.check("nucleus", match[0], probs)
        for step in stored.matches(rf"nucleus_{re.escape(match[1])}__q_xs_(.+)_t([0-9.]+)_dt([0-9.]+)"):
            replay, t, dt = sampler(step[1]), np.float32(step[2]), np.float32(step[3])
            times = Times(jnp.asarray(t), jnp.asarray(t - dt))
            check_masses(stored, replay.policy({}), replay, times, step[0], np.asarray(probs), canvas, mask_id)


# ------------------------------------------------------------------------------------------------------- trajectories


def trajectories() -> list[tuple[str, str]]:
    names = [name for name in FILES if name.startswith("trajectory")]
    return [(name, m[1]) for name in names for m in arrays(name).matches("(.*)__x_in")]


@functools.partial(jax.jit, static_argnums=0)
def predict(run: Sampler, params, carry) -> tuple[jax.Array, jax.Array]:
    """What the next step will use: hidden states [B, L, D], and filtered probabilities [B, L, V padded]."""
    hidden = run.denoiser(params, carry.canvas, carry.feedback)
    if carry.hidden is not None:
        hidden = jnp.where(carry.changed[:, None, None], hidden, carry.hidden)
    logits = run.denoiser.head(params).logits(hidden)
    return hidden, run.filters.probs(logits.reshape(-1, logits.shape[-1])).reshape(logits.shape)


step = jax.jit(Sampler.step, static_argnums=0)
finish = jax.jit(Sampler.finish, static_argnums=0)


@pytest.mark.parametrize("name, tag", trajectories())
def test_trajectory(diffusion, name, tag):
    """Token for token with the stored noise: the reference's race decides, our step is handed uniforms that do so."""
    stored = arrays(name)
    u = stored["U"] if "U" in stored else arrays("trajectory.npz")["U"]
    value = {
        key: stored[f"{tag}__{key}"].item() for key in "sampler p_nucleus eta t_on t_off alpha_on eps cache sm".split()
    }
    replay, steps = sampler(value["sampler"]), int(stored[f"{tag}__num_steps"])
    policy, mask_id = replay.policy(value), diffusion.denoiser.mask_id
    assert int(stored["mask_index"] if "mask_index" in stored else mask_id) == mask_id
    run = Sampler(
        diffusion.denoiser,
        diffusion.readout,
        policy,
        Filters(top_p=value["p_nucleus"], top_p_rule="reference"),
        use_feedback=bool(value["sm"]),
        refresh="on_batch_change" if value["cache"] else "always",
    )
    # The reference averages the backbone alone and samples with the live omega.
    averaged = {"backbone": diffusion.ema["backbone"], "softmask": diffusion.params["softmask"]}
    params = averaged if stored[f"{tag}__ema_weights"] else diffusion.params
    times = linear_times(steps, value["eps"])
    stored.check("noise", f"{tag}__t", times.t)
    compare("noise", f"{tag} dt", times.t - times.s, np.broadcast_to(stored[f"{tag}__dt"], (steps,)))
    USED[name, f"{tag}__dt"] = "compared"

    x_in, x_out, log_p, gaps, forwards = [], [], [], [], []
    carry = run.init(jnp.asarray(stored[f"{tag}__x_in"][0]))
    prompt = jnp.zeros(carry.canvas.shape, bool)
    for i in range(steps):
        canvas, now = np.asarray(carry.canvas), jax.tree.map(lambda x, i=i: x[i], times)
        forwards.append(bool(carry.changed.any()) or not value["cache"])
        hidden, probs = predict(run, params, carry)
        probs = np.asarray(probs, np.float64)[..., : diffusion.vocab]
        probs /= probs.sum(-1, keepdims=True)
        masked = jnp.asarray(canvas == mask_id)
        draw = draw_of(probs, np.argmax(probs, -1).astype(np.int32), canvas, mask_id)
        commit, remask = chances(policy, carry.canvas, masked, draw, now, carry.policy)
        race = mixture(commit, remask, probs, canvas, mask_id) / (1e-10 - np.log(u[i] + 1e-10))
        winner = np.argmax(race, -1)
        top = np.sort(race, -1)[..., -2:]
        open_race = top[..., 0] > 0
        gaps.append(
            np.min(np.log(top[..., 1][open_race] / top[..., 0][open_race]), initial=1e9)
        )  # 1e9: nothing is open
        # The middle of the winner's interval of the CDF, and a uniform that does or does not move.
        ends = np.cumsum(probs, -1)
        token = np.where(winner == mask_id, 0, winner)[..., None]
        u_token = np.take_along_axis(ends - probs / 2, token, -1)[..., 0]
        moves = np.where(canvas == mask_id, winner != mask_id, winner == mask_id)
        u_move = np.where(moves, 0.0, 1 - 2.0**-24).astype(np.float32)
        x_in.append(canvas)
        log_p.append(diffusion.log_probs(params, hidden, canvas))
        carry = step(run, params, carry, now, prompt, jnp.asarray(u_token, jnp.float32), jnp.asarray(u_move))
        x_out.append(np.asarray(carry.canvas))
    stored.check("trajectory tokens", f"{tag}__x_in", np.stack(x_in))
    stored.check("trajectory tokens", f"{tag}__x_out", np.stack(x_out))
    stored.check("trajectory tokens", f"{tag}__forward_called", np.asarray(forwards))
    assert int(carry.forwards) == sum(forwards)
    if f"{tag}__log_p_x0" in stored:
        stored.check("trajectory log-probs", f"{tag}__log_p_x0", np.stack(log_p), where=not_mask(diffusion))
    stored.check("trajectory log-probs", f"{tag}__min_log_gap_per_step", np.asarray(gaps))

    canvas = np.asarray(carry.canvas)
    stored.check("trajectory tokens", f"{tag}__x_final", finish(run, params, carry).tokens)
    # The reference always runs the last forward, we only if a mask is left.
    stored.check("trajectory tokens", f"{tag}__num_forward_total", sum(forwards) + 1)
    last = denoise(diffusion.denoiser, params, carry.canvas, carry.feedback)
    final = diffusion.log_probs(params, last, canvas)
    if f"{tag}__final_log_p" in stored:
        stored.check("trajectory log-probs", f"{tag}__final_log_p", final, where=not_mask(diffusion))
    best = np.sort(final[..., not_mask(diffusion)], -1)
    stored.check("trajectory log-probs", f"{tag}__final_argmax_min_gap", np.min(best[..., -1] - best[..., -2]))


# ----------------------------------------------------------------------------------------------------------- training


def test_ema():
    stored = arrays("ema_trace.npz")
    decay, shadow = float(stored["decay"]), jnp.asarray(stored["p0"])
    trace, decays = [], []
    for n, params in enumerate(stored["params"], start=1):
        shadow = update_ema(shadow, jnp.asarray(params), jnp.int32(n), decay)
        trace.append(shadow)
        decays.append(1 - update_ema(jnp.zeros(()), jnp.ones(()), jnp.int32(n), decay))
    stored.check("EMA", "shadow", np.stack(trace))
    stored.check("EMA", "effective_decay", np.stack(decays))


def test_adamw(diffusion):
    stored, batches = arrays("train5.npz"), arrays("loss.npz")
    objective, batch = example(diffusion, batches["valid"] > 0)
    config = OptimizerConfig(
        lr=float(stored["base_lr"]),
        lr_softmask=float(stored["base_tran_head_lr"]),
        warmup=int(stored["warmup_steps"]),
        clip=float(stored["clip"]),
    )
    pattern = stored["use_sm"]
    optimizer = make_optimizer(config, len(pattern))
    order = [mdlm.OMEGA[f"tran_head.{name}"] for name in stored["raw_order"].tolist()]
    start = files.load(need("mdlm.ckpt", "mdlm.safetensors")).tensors
    temperature = np.float32(start.get("tran_head.raw_temperature", 0.0))  # no parameter of top-k: it stays where it is

    @jax.jit
    def update(state, feedback):
        (loss, _), grads = jax.value_and_grad(objective, has_aux=True)(state.params, batch, feedback, None)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, feedback=feedback)
        params, done = optax.apply_updates(state.params, updates), state.step + 1
        ema = update_ema(state.ema, params, done, diffusion.ema_decay)
        return state.replace(step=done, params=params, ema=ema, opt_state=opt_state), loss, optax.global_norm(grads)

    state = init_state(diffusion.params, optimizer)
    losses, norms, raw = [], [], []
    for feedback in pattern:
        state, loss, norm = update(state, bool(feedback))
        losses.append(loss)
        norms.append(norm)
        raw.append([state.params["softmask"].get(name, temperature) for name in order])
    n = np.arange(len(pattern))
    stored.check("AdamW", "lr", config.rate(config.lr, 1)(n))
    stored.check("AdamW", "tran_lr", config.rate(config.lr_softmask, 1)(n))
    stored.check("loss", "loss", np.stack(losses))
    stored.check("AdamW", "grad_norm_preclip", np.stack(norms), scale=float(stored["grad_norm_preclip"].max()))
    stored.check("AdamW", "sm_raw", np.asarray(raw))
    live, averaged = (mdlm.from_tree(tree["backbone"], diffusion.config) for tree in (state.params, state.ema))
    for match in stored.matches("final_(backbone.*)"):
        stored.check("AdamW", match[0], live[match[1]])
    for match in stored.matches("final_ema_(backbone.*)"):
        stored.check("AdamW", match[0], averaged[match[1]])
    # omega's Adam count moves on soft-masked steps only; -1 stands for a parameter that never had a gradient.
    counts = {
        jax.tree_util.keystr(path): int(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "softmask" in jax.tree_util.keystr(path) and "count" in jax.tree_util.keystr(path)
    }
    assert len(counts) == 2, counts  # Adam's own and the schedule's, which follows the global step
    names = [mdlm.OMEGA[f"tran_head.{name}"] for name in stored["tran_head_param_order"].tolist()]
    steps = [min(counts.values()) if name in state.params["softmask"] else -1.0 for name in names]
    stored.check("AdamW", "tran_head_adam_step", np.asarray(steps))


# ----------------------------------------------------------------------------------------------------------------- AR


def test_ar(autoregressive):
    reference, stored = autoregressive, arrays("ar.npz")
    denoiser, params, tokens = reference.denoiser, reference.params, stored["x0"]
    inputs = jnp.asarray(stored["input_ids"])
    raw = reference.run(reference.table[inputs])
    # The reference overwrites the mask's logit; any value this low leaves the softmax of the others alone.
    stored.check("AR", "logits_raw", raw, where=not_mask(reference) | (stored["neg_infinity"] == 0))
    log_p = reference.readout.log_probs(denoiser.head(params), denoise(denoiser, params, inputs))[
        ..., : reference.vocab
    ]
    stored.check("AR", "log_probs", log_p, where=not_mask(reference))
    length = inputs.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))
    check_blocks(stored, "AR", "act_block", reference, reference.table[inputs], None, mask)
    objective = NextToken(denoiser, reference.readout)
    for name, valid in (("loss", np.ones(tokens.shape, bool)), ("loss_pad", stored["attention_mask_pad"] > 0)):
        batch = objective.corrupt(jax.random.key(0), {"tokens": jnp.asarray(tokens), "valid": jnp.asarray(valid)})
        loss, nll = jax.jit(objective)(params, batch, False, None)
        stored.check("AR", name, loss)
        if name == "loss":
            stored.check("AR", "nll_tok", nll)
            stored.check("AR tokens", "input_ids", batch.canvas)
            stored.check("AR tokens", "target_ids", batch.targets)
    config = mdlm.table(reference.config)
    listed = [f"{leaf.source} {leaf.shape}" for leaf in config]
    rotary = f"{mdlm.ROTARY} {(reference.config.width // reference.config.heads // 2,)}"
    assert sorted(stored["names"].tolist()) == sorted([*listed, rotary])


def test_ar_sampling(autoregressive):
    """Gumbel races with the stored noise, each handed to our draw as a uniform, over the KV cache."""
    reference, stored = autoregressive, arrays("ar.npz")
    denoiser, params, gumbel = reference.denoiser, reference.params, stored["sample_gumbel"]
    batch, steps = gumbel.shape[:2]
    cache = denoiser.model.cache(batch, steps + 1)
    decode, head = jax.jit(denoiser.decode), denoiser.head(params)
    pick = jax.jit(reference.readout.draw, static_argnums=4)
    rows, gaps = [np.full(batch, int(stored["sample_bos"]), np.int32)], []
    for i in range(steps):
        hidden, cache = decode(params, jnp.asarray(rows[-1])[:, None], cache, jnp.int32(i))
        log_p = np.asarray(reference.readout.log_probs(head, hidden)[:, 0, : reference.vocab], np.float64)
        winner = np.argmax(log_p + gumbel[:, i], -1)
        best = np.sort(log_p + gumbel[:, i], -1)
        gaps.append((best[:, -1] - best[:, -2]).min())
        probs = np.exp(log_p)
        u = np.take_along_axis(np.cumsum(probs, -1) - probs / 2, winner[:, None], -1).astype(np.float32)
        draw = pick(head, hidden, jnp.ones((batch, 1), bool), jnp.asarray(u), Filters())
        rows.append(np.asarray(draw.ids[:, 0]))
    stored.check("AR tokens", "sample_x", np.stack(rows, 1))
    stored.check("AR", "sample_min_gap", np.min(gaps))


# --------------------------------------------------------------------------------------------------------- conversion


def test_names(diffusion):
    """Our table is the reference's state_dict and its unnamed EMA list, in order."""
    lines = need("names.txt").read_text().splitlines()
    middle = next(i for i, line in enumerate(lines) if i and line.startswith("#"))
    order = [line.split(" ", 1) for line in lines[1:middle]]
    listed = [line.split(" ", 1)[1] for line in lines[middle + 1 :]]
    assert listed == [f"{leaf.source} {leaf.shape}" for leaf in mdlm.table(diffusion.config)]
    exported = mdlm.export_tree(diffusion.params, {"model": dataclasses.asdict(diffusion.config)}, "mdlm").tensors
    assert [[name, f"{value.shape} {value.dtype}"] for name, value in exported.items()] == order
    if (FOLDER / "ema.safetensors").exists():  # the list under its names
        averaged = mdlm.from_tree(diffusion.ema["backbone"], diffusion.config)
        for name, value in files.load(FOLDER / "ema.safetensors").tensors.items():
            compare("conversion", f"ema {name}", averaged[name], value)


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_round_trip(tmp_path, capsys, name, suffix):
    """file -> orbax -> file: every tensor and the EMA bit for bit."""
    source = files.load(FOLDER / name)
    base, extra = source, []
    if not source.tensors:  # an EMA alone, beside its checkpoint
        base, extra = files.load(need("mdlm.ckpt", "mdlm.safetensors")), [f"--ema={FOLDER / name}"]
    kind = "mdlm" if any("sigma_map" in key for key in base.tensors) else "ar"
    if mdlm.ROTARY not in base.tensors:
        whole = files.load(need("mdlm.ckpt", "mdlm.safetensors")).tensors
        extra.append(f"--heads={whole['backbone.vocab_embed.embedding'].shape[1] // (2 * whole[mdlm.ROTARY].size)}")
    for argv in (
        ["import", kind, str(FOLDER / base.name), str(tmp_path / "run"), *extra],
        ["export", kind, str(tmp_path / "run"), str(tmp_path / f"out{suffix}")],
    ):
        assert convert.main(argv) == 0, capsys.readouterr().err
    made = files.load(tmp_path / f"out{suffix}")
    has_head = kind == "ar" or any(key.startswith("tran_head.") for key in base.tensors)
    assert set(made.tensors) == {*base.tensors, mdlm.ROTARY, *(() if has_head else mdlm.OMEGA)}
    for key, value in base.tensors.items():
        assert made.tensors[key].dtype == value.dtype and made.tensors[key].tobytes() == value.tobytes(), key
        compare("conversion", key, made.tensors[key], value)
    if suffix == ".ckpt" and source.shadow is not None:
        assert made.ema == source.ema
        for i, (got, wanted) in enumerate(zip(made.shadow, source.shadow, strict=True)):
            assert got.tobytes() == wanted.tobytes(), i
            compare("conversion", f"ema {i}", got, wanted)


def test_everything_was_used(request):
    """No stored array is passed over in silence."""
    tests = {name for name in globals() if name.startswith("test_")}
    selected = {item.originalname for item in request.session.items if item.path == Path(__file__)}
    if selected < tests:
        pytest.skip(f"only {len(selected)} of {len(tests)} tests were selected")
    assert not unused(), f"{len(unused())} stored arrays were not used: {', '.join(unused()[:5])} ..."
