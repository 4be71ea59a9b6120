"""The optimizer (omega apart, schedules, Muon) and the moving average, against formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close, assert_identical, make_denoiser, make_params, same

from smdlm.models.base import MatrixAxes
from smdlm.optimizer import OptimizerConfig, TrainState, _clip, init_state, make_optimizer, update_ema
from smdlm.train import TrainConfig

STEPS = 20


@pytest.fixture(scope="module")
def params():
    return make_params(make_denoiser())


def gradients(params, seed=0, scale=1e-2):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32), params)


def config(**changes):
    return OptimizerConfig(**{"warmup": 0, "lr": 1e-3, **changes})


def optimizer_of(config):
    return make_optimizer(config, STEPS, make_denoiser().model.matrices())


def walk(optimizer, params, coins, grads=gradients):
    """[(params, opt_state)] before and after each update."""
    update = jax.jit(lambda g, s, p, coin: optimizer.update(g, s, p, feedback=coin))
    states = [(params, jax.jit(optimizer.init)(params))]
    for i, coin in enumerate(coins):
        params, state = states[-1]
        updates, state = update(grads(params, i), state, params, jnp.bool_(coin))
        states.append((optax.apply_updates(params, updates), state))
    return states


def moments(opt_state):
    """mu, nu and count of omega's Adam, whatever optax wraps them in."""
    leaves = jax.tree_util.tree_leaves_with_path(
        opt_state.inner_states["softmask"] if hasattr(opt_state, "inner_states") else opt_state
    )
    return {jax.tree_util.keystr(k): x for k, x in leaves if "mu" in str(k) or "nu" in str(k)}


def partition_state(opt_state):
    return opt_state[1]


# Omega


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_steps_without_feedback_leave_omega_alone(params, name):
    """Values and moments, bit for bit, though gradients are not zero; everything else moves."""
    coins = [True, False, False, True, False]
    states = walk(optimizer_of(config(name=name, weight_decay=0.1)), params, coins)
    for coin, (before, state), (after, next_state) in zip(coins, states[:-1], states[1:], strict=True):
        old, new = moments(partition_state(state)), moments(partition_state(next_state))
        assert len(old) == 6  # mu and nu of three scalars
        assert same(before["softmask"], after["softmask"]) == same(old, new) == (not coin)
        for one, two in zip(jax.tree.leaves(before["backbone"]), jax.tree.leaves(after["backbone"]), strict=True):
            assert np.any(one != two)


def test_omegas_schedule_follows_the_global_step(params):
    """Its first update comes late, so Adam takes a step of exactly the learning rate of that (global) update."""
    optimizer = optimizer_of(config(warmup=4, lr_softmask=0.02))
    states = walk(optimizer, params, [False, False, False, True])
    moved = jax.tree.map(lambda a, b: float(jnp.abs(b - a)), states[3][0]["softmask"], states[4][0]["softmask"])
    np.testing.assert_allclose(list(moved.values()), 0.02 * 3 / 4, rtol=1e-3)


def test_omega_has_its_own_rate_and_no_weight_decay(params):
    states = walk(optimizer_of(config(lr=0.0, lr_softmask=0.01, weight_decay=0.5)), params, [True])
    assert_identical(states[0][0]["backbone"], states[1][0]["backbone"])
    moved = jax.tree.map(lambda a, b: float(jnp.abs(b - a)), states[0][0]["softmask"], states[1][0]["softmask"])
    np.testing.assert_allclose(list(moved.values()), 0.01, rtol=1e-3)


# Schedules and clipping


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_first_update_has_rate_zero(params, name):
    """With warm-up update 0 moves nothing, but its gradient enters the moments."""
    states = walk(optimizer_of(config(name=name, warmup=5)), params, [True, True])
    assert_identical(states[0][0], states[1][0])
    assert not same(moments(partition_state(states[0][1])), moments(partition_state(states[1][1])))
    assert not same(states[1][0]["backbone"], states[2][0]["backbone"])
    assert not same(states[1][0]["softmask"], states[2][0]["softmask"])


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_rate(decay, warmup):
    rate = config(warmup=warmup, decay=decay, final_lr=0.1).rate(2.0, 50)
    n = np.arange(51)
    done = np.clip((n - warmup) / (50 - warmup), 0, 1)
    left = {"constant": np.ones(51), "cosine": (1 + np.cos(np.pi * done)) / 2, "linear": 1 - done}[decay]
    wanted = 2.0 * (np.minimum(1, n / warmup) if warmup else np.ones(51))
    wanted = wanted * (0.1 + 0.9 * left if decay != "constant" else 1)
    np.testing.assert_allclose(
        [float(rate(i)) for i in (*range(0, 51, 5), 11)], wanted[[*range(0, 51, 5), 11]], rtol=1e-5
    )


def test_clipping_is_torchs(params):
    """min(1, limit / (norm + 1e-6)): seen at a norm of 1e-6, where optax's rule would leave twice as much."""
    grads = jax.tree.map(jnp.zeros_like, params)
    grads["backbone"]["embed"] = grads["backbone"]["embed"].at[0, 0].set(1e-6)
    for limit, factor in ((5e-7, 0.25), (4e-6, 1.0)):
        clipped, _ = _clip(limit).update(grads, _clip(limit).init(params))
        np.testing.assert_allclose(clipped["backbone"]["embed"][0, 0], factor * 1e-6, rtol=1e-5)


def test_clipping_is_over_all_gradients(params):
    """The norm counts omega too: a large gradient there shrinks everybody's."""

    def loud(params, _):
        grads = gradients(params)
        return {**grads, "softmask": jax.tree.map(lambda x: x + 1e3, grads["softmask"])}

    state = walk(optimizer_of(config(clip=0.5)), params, [True], loud)[1][1]
    norm = optax.global_norm(loud(params, 0))
    mu = [x for k, x in jax.tree_util.tree_leaves_with_path(state) if ".mu" in jax.tree_util.keystr(k)]
    np.testing.assert_allclose(optax.global_norm(mu), 0.1 * 0.5, rtol=1e-3)  # (1 - b1) * clipped gradient
    embed = next(
        x
        for k, x in jax.tree_util.tree_leaves_with_path(state)
        if ".mu" in str(jax.tree_util.keystr(k)) and "embed" in str(k)
    )
    np.testing.assert_allclose(embed, 0.1 * gradients(params)["backbone"]["embed"] * 0.5 / norm, rtol=1e-3)


def test_adamw_is_adamw(params):
    """Two updates of the embedding against the textbook."""
    c = config(weight_decay=0.01, clip=1e9, b1=0.8, b2=0.95, eps=1e-6)
    states = walk(optimizer_of(c), params, [True, True])
    x = np.asarray(params["backbone"]["embed"], np.float64)
    m = v = 0.0
    for n in range(2):
        g = np.asarray(gradients(params, n)["backbone"]["embed"], np.float64)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        x = x - 1e-3 * (m / (1 - 0.8 ** (n + 1)) / (np.sqrt(v / (1 - 0.95 ** (n + 1))) + 1e-6) + 0.01 * x)
    np.testing.assert_allclose(states[2][0]["backbone"]["embed"], x, rtol=1e-5, atol=1e-6)


# Muon


def test_muon_orthogonalises_the_matrices_of_the_blocks(params):
    """Layer by layer, q, k and v apart; adaLN, embedding and head are left to AdamW (entries of size lr)."""
    c = config(name="muon", lr=1e-3, muon_lr=0.02)
    states = walk(optimizer_of(c), params, [True])
    moved = jax.tree.map(lambda a, b: np.asarray(b - a), states[0][0]["backbone"], states[1][0]["backbone"])
    blocks = moved["blocks"]
    width = 16
    matrices = [*blocks["mlp_in"]["kernel"], *blocks["mlp_out"]["kernel"]]
    matrices += [layer.reshape(width, width) for layer in blocks["attention_out"]["kernel"]]
    matrices += [layer[:, i].reshape(width, width) for layer in blocks["qkv"]["kernel"] for i in range(3)]
    for matrix in matrices:
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values[0] < 1.6 * np.median(values)  # 2 and more for the Gaussian gradients that came in
    raw = np.linalg.svd(np.asarray(gradients(params)["backbone"]["blocks"]["mlp_in"]["kernel"][0]), compute_uv=False)
    assert raw[0] > 1.4 * np.median(raw)
    # AdamW's first update has one size everywhere: (1 + b1 / (1 + b1)) lr, since optax gives Muon's companion Nesterov.
    for leaf in (blocks["adaln"]["kernel"], moved["embed"], moved["head"]["kernel"], blocks["mlp_in"]["bias"]):
        np.testing.assert_allclose(np.abs(leaf), 1e-3 * (1 + 0.9 / 1.9), rtol=0.05)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_parameter_that_the_model_does_not_list_is_refused(params, name):
    """Never silently AdamW."""
    listed = dict(make_denoiser().model.matrices())
    del listed["head/bias"]
    with pytest.raises(ValueError, match=r"\['head/bias'\].*do not list.*\['adapter'\]"):
        make_optimizer(config(name=name), STEPS, {**listed, "adapter": None}).init(params)


# EMA and state


def test_ema_follows_its_formula():
    ema, params = {"a": jnp.float32(1.0)}, [3.0, -2.0, 5.0, 0.5]
    shadow = 1.0
    for n, value in enumerate(params, start=1):
        d = min(0.3, (1 + n) / (10 + n))
        shadow = shadow - (1 - d) * (shadow - value)
        ema = update_ema(ema, {"a": jnp.float32(value)}, jnp.int32(n), 0.3)
        np.testing.assert_allclose(ema["a"], shadow, rtol=1e-6)
    assert (1 + 1) / 11 < 0.3 < (1 + 4) / 14  # both branches were met


def test_ema_starts_at_the_parameters_in_its_own_buffers(params):
    """The state is donated, and a buffer can be donated only once."""
    state = init_state(params, optimizer_of(config()))
    assert isinstance(state, TrainState) and int(state.step) == 0
    assert_identical(state.ema, state.params)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((state.params, state.ema))]
    assert len(set(pointers)) == len(pointers)


def test_state_is_f32(params):
    state = init_state(params, optimizer_of(config(name="muon")))
    kinds = {x.dtype for x in jax.tree.leaves(state)}
    assert kinds <= {jnp.dtype("float32"), jnp.dtype("int32"), jnp.dtype("bool")}


# Configuration


CHANGES = {
    "lr": 5e-3,
    "muon_lr": 0.1,
    "lr_softmask": 0.3,
    "warmup": 3,
    "decay": "cosine",
    "b1": 0.5,
    "b2": 0.5,
    "eps": 0.1,
    "weight_decay": 0.3,
    "clip": 1e-3,
    "name": "adamw",
    "final_lr": 0.5,
}


def test_every_field_changes_the_updates():
    """Seen in the traced update; ema_decay belongs to `update_ema`, final_lr counts with a decay."""
    params = {"backbone": {"blocks": {"mlp_in": {"kernel": jnp.ones((2, 4, 4))}}, "b": jnp.ones(3)}}
    params["softmask"] = {"raw": jnp.float32(1.0)}

    def program(**changes):
        changed = config(**{"name": "muon", "decay": "linear", **changes})
        optimizer = make_optimizer(changed, STEPS, {"blocks/mlp_in/kernel": MatrixAxes((1,), (2,)), "b": None})
        update = lambda g, s, p: optimizer.update(g, s, p, feedback=True)
        return str(jax.make_jaxpr(update)(params, jax.eval_shape(optimizer.init, params), params))

    assert {f.name for f in dataclasses.fields(OptimizerConfig)} == set(CHANGES) | {"ema_decay"}
    assert program() == program()
    for name, value in CHANGES.items():
        assert program(**{name: value}) != program(), name


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "sgd"},
        {"decay": "step"},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"muon_lr": -1.0},
        {"lr_softmask": -1.0},
        {"warmup": -1},
        {"weight_decay": -0.1},
        {"final_lr": -0.1},
        {"clip": 0.0},
        {"eps": 0.0},
        {"b1": 1.0},
        {"b2": -0.1},
        {"ema_decay": 1.0},
    ],
)
def test_fields_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="got .*, wanted"):
        OptimizerConfig(**wrong)


def test_iso_compute_halves_the_updates():
    """At an equal number of forwards; nothing to halve without soft-masking."""
    iso = TrainConfig(steps=101, update_budget="iso_compute")
    assert (iso.updates(0.8), iso.updates(0.0)) == (50, 101)
    assert TrainConfig(steps=101).updates(0.8) == 101
    assert TrainConfig(steps=1, update_budget="iso_compute").updates(0.5) == 1


def test_helpers_notice_a_difference():
    one = {"a": jnp.float32(1)}
    assert same(one, {"a": jnp.float32(1)}) and not same(one, {"a": jnp.float32(np.nextafter(np.float32(1), 2))})
    with pytest.raises(AssertionError):
        assert_close(one, {"a": jnp.float32(1.1)})
