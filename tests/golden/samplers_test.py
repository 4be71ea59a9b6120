"""One step of every sampler: the masses that it draws from, and the nucleus."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from golden.arrays import NOISE, Arrays, Group, compare
from golden.forms import chances, draw_of, mixture, sampler
from golden.models import MDLM
from smdlm.ops.filters import Filters
from smdlm.sampling.policies import Policy, Times

MASSES = Group("sampler masses", 3e-7)
NUCLEUS = Group("nucleus", 1e-6)
BFLOAT16 = 2.0**-7 / MASSES.tolerance  # size for arrays of 8 bits: ours, in f32, at that precision


def cases() -> list[tuple[str, str]]:
    """(case, sampler) of samplers.npz."""
    names = MDLM.arrays("samplers.npz")["case_names"].tolist() if MDLM.has("samplers.npz") else []
    return [(name, re.match("(.*?)_t[0-9]", name)[1]) for name in names]


@pytest.mark.parametrize("case, name", cases())
def test_masses(case, name):
    replay, stored = sampler(name), MDLM.arrays("samplers.npz")
    value = {key: float(stored[f"{case}__{key}"]) for key in ("t", "dt", "eta", "t_on", "t_off", "alpha_on")}
    policy, t = replay.policy(value), np.float32(value["t"])
    times = Times(jnp.asarray(t), jnp.asarray(t - np.float32(value["dt"])))
    compare(NOISE, f"{case} alpha_t", 1 - times.t, stored[f"{case}__alpha_t"])
    compare(NOISE, f"{case} alpha_s", 1 - times.s, stored[f"{case}__alpha_s"])
    conf = jnp.asarray(stored["conf_in"]) if replay.confident else None
    probs, total = stored["p_x0"], replay.total(value)
    masses = check_masses(stored, policy, total, times, f"{{}}__{case}__q_xs", probs, stored["x"], conf)
    if replay.confident:
        check_confidence(stored, policy, times, case, masses)
        if times.t == 1 and "remdm-conf_first__x" in stored:  # all masked, no confidence yet
            first, pattern = stored["remdm-conf_first__x"], "remdm__remdm-conf_first__q_xs"
            none = policy.init(jnp.ones(first.shape, bool))
            check_masses(stored, policy, total, times, pattern, probs, first, none)


def check_masses(
    stored: Arrays,
    policy: Policy,
    total: float,
    times: Times,
    pattern: str,
    probs: np.ndarray,
    canvas: np.ndarray,
    carry: jnp.ndarray | None = None,
) -> np.ndarray:
    """Compares q(x_s) [B, L, V] with the arrays of that name pattern, of one code base or of both; returns ours."""
    keys = [key for key in dict.fromkeys((pattern.format("ibm"), pattern.format("remdm"))) if key in stored]
    assert keys, f"got no array {pattern}, wanted one"
    mask_id = int(stored["mask_index"])
    masked = canvas == mask_id
    draw = draw_of(probs, np.argmax(probs, -1).astype(np.int32), canvas, mask_id)
    carry = policy.init(jnp.asarray(masked)) if carry is None else carry
    commit, remask = chances(policy, jnp.asarray(canvas), jnp.asarray(masked), draw, times, carry)
    masses = mixture(commit, remask, probs, canvas, mask_id) * total
    # The formula of a sampler that masks nothing again also runs on known tokens, which its caller then keeps.
    where = masked[..., None] if not np.asarray(remask).any() else True
    for key in keys:
        stored.check(MASSES, key, masses, where=where)
    return masses


def check_confidence(stored: Arrays, policy: Policy, times: Times, case: str, masses: np.ndarray) -> None:
    """The confidences after the step whose outcome is stored, and their half-precision twin."""
    canvas, after, mask_id = stored["x"], stored["conf_xs_out"], int(stored["mask_index"])
    draw = draw_of(stored["p_x0"], after, canvas, mask_id)
    u = jnp.where(canvas != after, 0.0, 1 - 2.0**-24)  # 0 commits or re-masks
    masked = jnp.asarray(canvas == mask_id)
    *_, conf = policy(u, jnp.asarray(canvas), masked, draw, times, jnp.asarray(stored["conf_in"]))
    stored.check(MASSES, f"{case}__conf_out", conf)
    twin = f"remdm__{case}__bf16__q_xs"
    if twin in stored:
        assert str(stored[f"{twin}_dtype"]) == "torch.bfloat16"
        stored.check(MASSES, f"{case}__bf16__conf_out", conf, size=BFLOAT16)
        stored.check(MASSES, twin, masses, size=BFLOAT16)


def test_every_sampler_of_both_code_bases_is_replayed():
    """Masses that both code bases have are compared with one and the same array of ours, because they are the same."""
    stored = MDLM.arrays("samplers.npz")
    replayed = {case for case, _ in cases()} | {m[1] for m in stored.matches("(nucleus_.*)__p_x0")}
    assert set(stored["remdm_bit_identical_to_ibm"].tolist()) <= replayed
    assert not stored["remdm_different_from_ibm"].size


def filtered(log_p: np.ndarray, filters: Filters) -> np.ndarray:
    """log p(x_0) [B, L, V] -> what is drawn from, normalised."""
    probs = filters.probs(jnp.asarray(log_p).reshape(-1, log_p.shape[-1]))
    return np.asarray(probs / probs.sum(-1, keepdims=True)).reshape(log_p.shape)


def test_nucleus():
    stored = MDLM.arrays("samplers.npz")
    canvas, log_p = stored["x"], stored["log_p_x0"]
    stored.check(NUCLEUS, "p_x0", filtered(log_p, Filters()))
    matches = stored.matches(r"nucleus_([0-9.]+)__p_x0")
    assert matches
    for match in matches:
        probs = filtered(log_p, Filters(top_p=float(match[1]), top_p_rule="reference"))
        stored.check(NUCLEUS, match[0], probs)
        for step in stored.matches(rf"nucleus_{re.escape(match[1])}__q_xs_(.+)_t([0-9.]+)_dt([0-9.]+)"):
            replay, t, dt = sampler(step[1]), np.float32(step[2]), np.float32(step[3])
            times = Times(jnp.asarray(t), jnp.asarray(t - dt))
            check_masses(stored, replay.policy({}), replay.total({"t": t}), times, step[0], probs, canvas)
