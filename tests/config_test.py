"""Configs: every field reaches what is built and changes it, every mistake is one clear line."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
from absl import flags

from smdlm import command
from smdlm.build import build
from smdlm.config import CHOICES, SECTIONS, read
from smdlm.feedback.gates import ConstantGate, EntropyGate
from smdlm.feedback.mixers import NormLerp, Slerp
from smdlm.full_softmask import FullSoftMask
from smdlm.sampling.ar import ARSampler
from smdlm.sampling.loop import Sampler
from smdlm.sampling.policies import POLICIES
from smdlm.softmask import SoftMask

ROOT = Path(__file__).parents[1]


def fields_of(section):
    """{field: 'int', 'float', 'str' or 'bool'} of a section with the classes that its choices name by default."""
    choices = CHOICES.get(section, {})
    classes = [SECTIONS[section], *(choice.table[choice.default] for choice in choices.values() if choice.default)]
    found = {f.name: getattr(f.type, "__name__", f.type) for cls in classes for f in dataclasses.fields(cls)}
    return {**found, **dict.fromkeys(choices, "str")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(20):
        (folder / f"{i:02d}.txt").write_text(f"line {i} of a small corpus " * 5, "utf-8")
    return f"text:{folder}/*.txt"


def make_config(source="text:*.txt", **changes):
    """A micro config; `softmask__k=1` sets config.softmask.k."""
    config = ml_collections.ConfigDict()
    config.model = dict(width=16, depth=1, heads=2, cond=8, dropout=0.0, vocab_multiple=1)
    config.data = dict(source=source, tokenizer="bytes", seq_len=16, batch_size=4)
    config.softmask = dict(p_sm=0.8, scale=0.5)
    config.optimizer = dict(name="muon", warmup=0, decay="linear", final_lr=0.1)
    config.train = dict(steps=10, log_every=2, save_every=4)
    config.sampling = dict(steps=4, top_p=0.9)
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if section not in config:
            config[section] = {}
        config[section][field] = value
    return config


def built(corpus, tmp_path, **changes):
    return build(read(make_config(corpus, **changes)), tmp_path)


def one_line(config):
    """The message of the one ValueError with which `read` refuses a config."""
    with pytest.raises(ValueError) as error:
        read(config)
    message = str(error.value)
    assert "\n" not in message and "got" in message and "wanted" in message, message
    return message


# What is refused


@pytest.mark.parametrize("section", SECTIONS)
def test_misspelt_fields_are_refused(section):
    message = one_line(make_config(**{f"{section}__stepz": 3}))
    assert section in message and "stepz" in message
    assert all(name in message for name in fields_of(section))  # what could have been meant


def test_misspelt_sections_are_refused():
    assert "optimiser" in one_line(make_config(optimiser__lr=1.0))


def all_fields():
    return [(section, field, kind) for section in SECTIONS for field, kind in fields_of(section).items()]


@pytest.mark.parametrize("section, field, kind", all_fields())
def test_a_wrong_type_is_refused(section, field, kind):
    wrong = {"int": [1.5, "1", True, None], "float": ["1", True], "str": [3, None], "bool": [1, "yes"]}[kind]
    if (section, field) == ("readout", "k"):
        return  # given by softmask.k alone, see below
    for value in wrong:
        config = make_config()
        sections = {name: dict(config[name]) for name in config}
        sections.setdefault(section, {})[field] = value
        message = one_line(sections)
        wanted = "true or false" if kind == "bool" else kind
        assert field in message and repr(value) in message and wanted in message


OUT_OF_RANGE = {
    **{f"model__{name}": 0 for name in ("width", "depth", "heads", "cond", "vocab_size", "vocab_multiple")},
    **{
        "model__dropout": 1.0,
        "model__dtype": "fp8",
        "model__remat": "some",
        "model__attention": "flash",
        "noise__eps": 1.0,
        "noise__replace": 1.0,
        "softmask__coin": "token",
    },
    **{"data__source": "web:x", "data__tokenizer": "words", "data__seq_len": 1, "data__batch_size": 0},
    **{"data__framing": "lines", "data__val_fraction": 1.5, "data__val_documents": -1, "data__field": ""},
    **{"data__seed": -1, "data__train_split": ""},
    **{"times__kind": "sobol", "times__t_min": 0.0, "times__t_max": 1.5},
    **{"softmask__p_sm": 1.5, "softmask__variant": "dense", "softmask__k": 0, "softmask__gate": "open"},
    **{"softmask__mixer": "mean", "softmask__scale": 2.0, "softmask__centre": 1.0, "softmask__steepness": -1.0},
    **{"readout__chunk": 0, "optimizer__name": "sgd", "optimizer__lr": -1.0, "optimizer__decay": "exp"},
    **{"train__steps": 0, "train__accumulate": 3, "train__update_budget": "half", "train__save_every": 3},
    **{"train__eval_every": 3, "train__log_every": 0, "train__keep": 0},
    **{"sampling__policy": "best", "sampling__temperature": -1.0, "sampling__top_p": 0.0, "sampling__count": 0},
    **{"sampling__omega": "raw", "eval__omega": "new", "sampling__steps": 0, "sampling__refresh": "never"},
    **{"sampling__feedback_source": "all", "sampling__viewer": "run.gif"},
    **{
        "sampling__top_p_rule": "hf",
        "eval__samples": "pretty",
        "eval__blocks": 0,
        "eval__batch_size": 0,
        "eval__draws": 0,
        "eval__chain": -1,
    },
    **{"mesh__data": 0, "mesh__fsdp": -2, "mesh__tensor": 0},
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused(name):
    value = OUT_OF_RANGE[name]
    message = one_line(make_config(**{name: value}))
    assert str(value) in message


@pytest.mark.parametrize(
    "changes",
    [
        {"model__causal": True},  # with p_sm .8
        {"model__causal": 1},
        {"model__width": 15},
        {"model__heads": 3},
        {"train__accumulate": 8},
        {"readout__k": 2},
        {"softmask__variant": "full", "softmask__temperature": 0.0},
        {"softmask__soften": True},  # with p_sm .8
        {"softmask__soften": True, "softmask__p_sm": 0.0},  # with the entropy gate
        {"softmask__soften": True, "softmask__p_sm": 0.0, "softmask__gate": "constant", "softmask__variant": "project"},
        {"softmask__soften": True, "softmask__p_sm": 0.0, "softmask__gate": "constant", "softmask__variant": "full"},
        {"model__causal": True, "softmask__p_sm": 0.0, "softmask__soften": True, "softmask__gate": "constant"},
        {"softmask__variant": "project", "softmask__mixer": "slerp"},
        {"model__causal": True, "softmask__p_sm": 0.0, "noise__replace": 0.1},
        {"mesh__data": -1, "mesh__fsdp": -1},
    ],
)
def test_impossible_combinations_are_refused(changes):
    one_line(make_config(**changes))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"sampling__steps": 0},
        {"sampling__refresh": "never"},
        {"sampling__feedback_source": "all"},
        {"sampling__policy": "best"},
        {"sampling__eta": 0.1},  # not a parameter of mdlm
        {"sampling__policy": "remdm_cap", "sampling__eta": 2.0},
        {"sampling__policy": "entropy", "sampling__order_temperature": -1.0},
        {"sampling__policy": "remdm_loop", "sampling__eta": "much"},
    ],
)
def test_sampler_fields_are_refused_before_data_is_read(changes, causal):
    message = one_line(make_config(**changes, **({"model__causal": True, "softmask__p_sm": 0.0} if causal else {})))
    assert list(changes)[-1].removeprefix("sampling__") in message


def test_the_causal_model_refuses_what_it_would_ignore():
    for field, value in {"policy": "entropy", "refresh": "on_change", "use_feedback": False}.items():
        changes = {"model__causal": True, "softmask__p_sm": 0.0, f"sampling__{field}": value}
        assert f"sampling.{field}: got {value!r} for the causal" in one_line(make_config(**changes))


def parameters():
    """(section, choice, name, field) of every class that a choice may name; what all of them share is left out."""
    found = []
    for section, choices in CHOICES.items():
        shared = {"vocab_size", *(f.name for f in dataclasses.fields(SECTIONS[section]))}
        for choice in choices:
            for name, cls in choices[choice].table.items():
                fields = [f.name for f in dataclasses.fields(cls)]
                if choices[choice].target:  # the first one stands behind the colon
                    name, fields = f"{name}:docstrings", fields[1:]
                found += [(section, choice, name, field) for field in fields if field not in shared]
    return found


OTHER = {  # values that the rest of the section allows, where a little more than the default is not one
    "model": {
        **{"heads": 6, "width": 72, "key_heads": 1, "table_rows": 4, "remat": "block", "attention": "xla"},
        **{"dtype": "bfloat16", "param_dtype": "bfloat16", "products": "bfloat16"},
    },
    "softmask": {
        **{"scale": 0.25, "centre": -3.0, "norm": "mask", "most_if": "sure", "t_to": 0.5, "nucleus": 0.5, "levels": 3},
        **{"first": 0.5, "last": 0.5},
    },
    "sampling": {"detector": "better", "threshold": 0.5, "edit_threshold": 0.5},
    "data": {"buckets": "8,16", "held_out": "test", "rules": "lm1b"},
}


@pytest.mark.parametrize("section, choice, name, field", parameters())
def test_fields_of_a_chosen_class_are_config_fields(section, choice, name, field):
    """They reach the object beside its other defaults."""
    cls = CHOICES[section][choice].table[name.partition(":")[0]]
    causal = section == "model" and (field == "causal" or cls.causal)
    others = {"softmask__p_sm": 0.0} if causal else {}
    config = {key: dict(value) for key, value in make_config(**others).items()}
    needed = {"softmask": ("p_sm",), "data": ("tokenizer", "seq_len", "batch_size")}.get(section, ())
    config[section] = {key: config[section][key] for key in needed}
    default = next(f.default for f in dataclasses.fields(cls) if f.name == field)
    value = OTHER.get(section, {}).get(field)
    if value is None:
        value = not default if isinstance(default, bool) else default + {int: 1, float: 0.01, str: "x"}[type(default)]

    def made(**changes):
        found = getattr(read({**config, section: {**config[section], choice: name, **changes}}), section)
        found = found if section == "model" else getattr(found, choice)
        return found[0] if isinstance(found, tuple) else found

    assert made(**{field: value}) == dataclasses.replace(made(), **{field: value}) != made()


@pytest.mark.parametrize(
    "changes, owners",
    [
        ({"sampling__policy": "entropy", "sampling__eta": 0.1}, "policy remdm_cap, remdm_rescale, remdm_loop"),
        ({"softmask__gate": "constant", "softmask__steepness": 1.0}, "gate entropy, band"),
        ({"softmask__temperature": 2.0}, "variant full, project, gated"),
    ],
)
def test_a_field_of_another_class_is_refused_with_its_owners(changes, owners):
    field = list(changes)[-1].partition("__")[2]
    assert f"got {field} (a field of {owners}), wanted one of" in one_line(make_config(**changes))


def test_a_choice_on_the_command_line_drops_what_the_file_meant_for_another():
    file = {"sampling__policy": "remdm_cap", "sampling__eta": 0.3, "softmask__centre": -1.0}
    config = make_config(**file)
    config.sampling.policy, config.softmask.gate = "remdm_loop", "constant"
    got = read(config, ["sampling.policy", "softmask.gate"])
    assert got.sampling.policy == POLICIES["remdm_loop"]() and got.softmask.gate == ConstantGate()
    config.sampling.eta = 0.1
    assert read(config, ["sampling.policy", "sampling.eta", "softmask.gate"]).sampling.policy.eta == 0.1


def test_a_model_on_the_command_line_keeps_the_sizes_of_the_file():
    """Fields of one name mean the same in all models."""
    config = make_config()
    config.model.name = "dit"
    assert read(config, ["model.name"]).model == read(make_config()).model


def test_missing_fields_are_named():
    config = make_config()
    del config.data["tokenizer"]
    assert "tokenizer" in one_line(config)
    config = make_config()
    del config["data"]
    assert "source" in one_line(config)


def test_devices_and_vocabulary_must_fit(corpus, tmp_path):
    with pytest.raises(ValueError, match="mesh: got .*, wanted"):
        built(corpus, tmp_path, mesh__data=7)
    with pytest.raises(ValueError, match="model.vocab_size: got 100, wanted at least 258"):
        built(corpus, tmp_path, model__vocab_size=100)


# What is built


def test_defaults_are_the_papers():
    config = make_config()
    for section in ("softmask", "optimizer", "train"):
        del config[section]
    config.train = dict(steps=1000)
    got = read(config)
    assert (got.softmask.p_sm, got.softmask.k, got.optimizer.lr, got.optimizer.lr_softmask) == (0.8, 3, 3e-4, 1e-2)
    assert (got.optimizer.warmup, got.optimizer.ema_decay, got.optimizer.clip) == (2500, 0.9999, 1.0)
    assert got.readout.k == 3


def test_softmask_parts():
    make = lambda **changes: read(make_config(**{f"softmask__{k}": v for k, v in changes.items()})).softmask.operator
    assert make() == SoftMask(k=3, gate=EntropyGate(scale=0.5))
    assert make(p_sm=0.0) is None
    assert make(k=1, mixer="slerp") == SoftMask(k=1, gate=EntropyGate(scale=0.5), mixer=Slerp())
    assert make(gate="constant", mixer="norm_lerp") == SoftMask(k=3, gate=ConstantGate(0.5), mixer=NormLerp())
    wanted = FullSoftMask(k=3, gate=EntropyGate(0.5, -1.0, 3.0), temperature=2.0)
    assert make(variant="full", temperature=2.0, centre=-1.0, steepness=3.0) == wanted


def fingerprint(experiment):
    """What the compiled programs and the start of a run depend on, without compiling anything."""
    state = jax.eval_shape(experiment.init_state)
    batch = {"tokens": np.zeros((experiment.config.data.batch_size, experiment.config.data.seq_len), np.int32)}
    batch["valid"] = np.ones(len(batch["tokens"]), bool)
    softmask = experiment.denoiser.softmask
    omega = {k: float(v) for k, v in softmask.init().items()} if softmask else {}
    step = jax.make_jaxpr(experiment.train_step())(state, batch)
    return str(step), [np.asarray(c).tolist() for c in step.consts], omega


REACH_THE_STEP = {
    **{"model__width": 32, "model__depth": 2, "model__heads": 4, "model__cond": 4, "model__dropout": 0.1},
    **{
        "model__dtype": "bfloat16",
        "model__products": "bfloat16",
        "model__remat": "block",
        "model__attention": "xla",
        "model__vocab_multiple": 128,
        "model__vocab_size": 300,
    },
    **{"noise__eps": 0.1, "times__kind": "iid", "times__t_min": 0.2, "times__t_max": 0.7},
    **{"softmask__p_sm": 0.3, "softmask__variant": "full", "softmask__k": 2, "softmask__gate": "constant"},
    **{"softmask__mixer": "slerp", "softmask__scale": 0.2, "softmask__centre": -1.0, "softmask__steepness": 1.0},
    **{"readout__chunk": 7, "train__accumulate": 2, "train__seed": 1, "train__steps": 12},
    **{"train__update_budget": "iso_compute", "data__seq_len": 12, "data__batch_size": 8},
    **{"noise__replace": 0.1, "softmask__coin": "example", "softmask__through": True},
    **{"optimizer__name": "adamw", "optimizer__lr": 1e-3, "optimizer__muon_lr": 0.1, "optimizer__lr_softmask": 0.1},
    **{"optimizer__warmup": 3, "optimizer__decay": "cosine", "optimizer__final_lr": 0.2, "optimizer__b1": 0.8},
    **{"optimizer__b2": 0.9, "optimizer__eps": 1e-6, "optimizer__weight_decay": 0.1, "optimizer__clip": 0.5},
    **{"optimizer__ema_decay": 0.9},
}


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    experiment = built(corpus, tmp_path_factory.mktemp("cache"))
    return experiment, fingerprint(experiment)


@pytest.mark.parametrize("name", REACH_THE_STEP)
def test_fields_reach_the_train_step(name, base, corpus, tmp_path):
    """Each changes the traced program, its constants or where omega starts."""
    assert fingerprint(built(corpus, tmp_path, **{name: REACH_THE_STEP[name]})) != base[1]


def test_the_fingerprint_is_stable(base, corpus, tmp_path):
    assert fingerprint(built(corpus, tmp_path)) == base[1]


REACH_THE_SAMPLER = {
    **{"sampling__steps": 5, "sampling__temperature": 0.5, "sampling__top_p": 0.8, "sampling__top_p_rule": "reference"},
    **{"sampling__use_feedback": False, "sampling__feedback_source": "raw", "sampling__refresh": "on_change"},
    **{"readout__chunk": 7, "sampling__policy": "entropy"},
}


@pytest.mark.parametrize("name", REACH_THE_SAMPLER)
def test_fields_reach_the_sampler(name, base, corpus, tmp_path):
    def program(experiment):
        sampler = experiment.sampler
        arguments = (experiment.abstract_params()[0], jax.random.key(0), np.zeros((2, 16), np.int32))
        return str(jax.make_jaxpr(lambda *xs: sampler(*xs))(*arguments))

    assert program(built(corpus, tmp_path, **{name: REACH_THE_SAMPLER[name]})) != program(base[0])


def test_batches(base, corpus, tmp_path):
    """Training batches: shuffled by data.seed, resumed at a number; validation: the first blocks, in order."""
    experiment, _ = base
    one, two = experiment.train_batches(0), experiment.train_batches(1)
    next(one)
    np.testing.assert_array_equal(next(one)["tokens"], next(two)["tokens"])
    other = built(corpus, tmp_path, data__seed=1).train_batches(0)
    assert np.any(next(other)["tokens"] != next(experiment.train_batches(0))["tokens"])
    val = [b["tokens"] for b in experiment.eval_batches(512, 64)]
    np.testing.assert_array_equal(np.concatenate(val)[: len(experiment.data.val)], list(experiment.data.val))
    valid = [b["valid"].tolist() for b in experiment.eval_batches(3, 2)]
    assert valid == [[True, True], [True, False]]


def test_init_state_is_seeded_and_starts_at_the_binary_model(base, corpus, tmp_path):
    """The same seed, the same state; another seed, another embedding; head at zero."""
    one, two = (built(corpus, tmp_path, train__seed=s).init_state() for s in (0, 1))
    np.testing.assert_array_equal(one.params["backbone"]["embed"], base[0].init_state().params["backbone"]["embed"])
    assert np.any(one.params["backbone"]["embed"] != two.params["backbone"]["embed"])
    assert not np.any(one.params["backbone"]["head"]["kernel"]) and int(one.step) == 0
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), one)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), base[0].abstract_state())


def test_the_ar_baseline(corpus, tmp_path):
    experiment = built(corpus, tmp_path, model__causal=True, softmask__p_sm=0.0)
    assert isinstance(experiment.sampler, ARSampler) and experiment.denoiser.softmask is None
    assert type(experiment.objective).__name__ == "NextToken" and experiment.sampler.bos_id == 256


def test_a_binary_model_can_be_softened(corpus, tmp_path):
    """Sampled and evaluated with feedback, trained without: its parameters and its loss are those of the binary one."""
    soft = built(corpus, tmp_path, softmask__p_sm=0.0, softmask__soften=True, softmask__gate="constant")
    plain = built(corpus, tmp_path, softmask__p_sm=0.0)
    assert soft.sampler.use_feedback and soft.denoiser.softmask.gate == ConstantGate(0.5)
    state = jax.eval_shape(plain.init_state)
    assert jax.tree.structure(jax.eval_shape(soft.init_state)) == jax.tree.structure(state)
    batch = {"tokens": np.zeros((4, 16), np.int32), "valid": np.ones(4, bool)}

    def loss(objective):
        return lambda params, key: objective(params, objective.corrupt(key, batch), True, None)

    arguments = (state.params, jax.random.key(0))
    assert str(jax.make_jaxpr(loss(soft.objective))(*arguments)) == str(
        jax.make_jaxpr(loss(plain.objective))(*arguments)
    )


def test_the_matrices_of_an_operator_are_parameters(corpus, tmp_path):
    """With the backbone's optimizer, an EMA and a place on the mesh; the gate's scalars stay a group of their own."""
    experiment = built(corpus, tmp_path, softmask__variant="gated", softmask__inner=8)
    state = experiment.abstract_state()
    assert {name: x.shape for name, x in state.ema["softmask"].items() if x.shape} == {
        **{"norm": (16,), "gate": (16, 8), "up": (16, 8), "down": (8, 16)}
    }
    specs = {name: x.sharding.spec for name, x in state.params["softmask"].items() if x.shape}
    assert specs["gate"] == jax.sharding.PartitionSpec("fsdp", "tensor")
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    assert any("muon" in name and "'gate'" in name for name in names)
    assert any("'softmask'" in name and "raw_scale" in name for name in names)


def test_a_binary_model_is_sampled_without_feedback(corpus, tmp_path):
    sampler = built(corpus, tmp_path, softmask__p_sm=0.0).sampler
    assert isinstance(sampler, Sampler) and not sampler.use_feedback


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda f: f.stem)
def test_shipped_configs_are_read(file):
    """And say in their docstring how they are run."""
    if file.stem == "__init__":
        return
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert read(module.get_config()).train.steps > 0
    assert f"--config=configs/{file.name}" in module.__doc__


@pytest.mark.parametrize(
    "content, words",
    [
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "no attribute 'get_config'"),
        ("import nosuchmodule", "No module named 'nosuchmodule'"),
        ("def get_config(): raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("def get_config(): return None", "get_config() returns NoneType"),
        ("def get_config(): return {}", "get_config() returns dict"),
    ],
)
def test_what_a_config_file_does_wrong_is_one_line(tmp_path, content, words):
    file = tmp_path / "c.py"
    file.write_text(content)
    with pytest.raises(ValueError) as error:
        command.load_config(file)
    message = str(error.value)
    assert message.startswith(f"--config: got {file}") and words in message and "\n" not in message


def test_a_section_that_is_no_section_is_refused():
    with pytest.raises(ValueError, match="config.data: got 'x', wanted a section of fields"):
        read({"data": "x"})


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("--config.steps=1e3", "config.steps: got '1e3', wanted int"),
        ("--config.rate=1,5", "config.rate: got '1,5', wanted float"),
        ("--again=maybe", "--again: got 'maybe', wanted true or false"),
        ("--mode=trian", "--mode: got 'trian', wanted one of train, eval"),
        ("--nfe=0", "--nfe: got '0', wanted a positive integer"),
    ],
)
def test_a_flag_of_the_wrong_type_is_told_in_our_words(given, wanted):
    values = flags.FlagValues()
    flags.DEFINE_integer("config.steps", 1, "", flag_values=values)
    flags.DEFINE_float("config.rate", 1.0, "", flag_values=values)
    flags.DEFINE_bool("again", False, "", flag_values=values)
    flags.DEFINE_enum("mode", "train", ["train", "eval"], "", flag_values=values)
    flags.DEFINE_integer("nfe", 1, "", lower_bound=1, flag_values=values)
    with pytest.raises(flags.IllegalFlagValueError) as error:
        values(["program", given])
    assert command.message(error.value) == wanted


@pytest.mark.parametrize(
    "raised, line",
    [
        (ValueError("a: got b, wanted c"), "error: a: got b, wanted c"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
    ],
)
def test_a_program_ends_by_one_line(capsys, raised, line):
    with pytest.raises(SystemExit) as end:
        with command.told():
            raise raised
    assert end.value.code == 2 and capsys.readouterr().err == f"{line}\n"


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        with command.told():
            raise ZeroDivisionError
