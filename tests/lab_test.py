"""The laboratory: laws against enumeration, metrics on samples whose quality is known, and the page of a study."""

import dataclasses
import hashlib
import itertools
import json

import ml_collections
import numpy as np
import pytest
from conftest import READOUT, make_denoiser, make_params

from configs import lab as lab_config
from smdlm import study
from smdlm.data.config import DataConfig
from smdlm.data.lab import LENGTHS, Markov, Sums, law, symbols_of
from smdlm.data.sources import Lab
from smdlm.data.text import load
from smdlm.evaluate.base import Subject, ratio
from smdlm.evaluate.lab import FLOOR, LabLikelihood, LabSamples, ideal_samples, rows_of, values_of
from smdlm.files import write_json
from smdlm.objective import SoftMaskedDiffusion

CHAINS = [Markov(3, 1, 0), Markov(3, 2, 1)]


def everything(symbols, length):
    return np.array(list(itertools.product(range(symbols), repeat=length)))


def ids_of(law, symbols):
    return np.array([ord(character) for character in law.alphabet])[symbols]


# --------------------------------------------------------------------------------------------------------------- laws


def test_texts_never_change():
    """Every number of the laboratory that was ever written down rests on these texts."""
    chain, sums = Markov(64, 1, 0), Sums(2, 0)
    assert chain.entropy_rate == pytest.approx(1.7297503922853492, abs=1e-12)
    digest = lambda text: hashlib.sha256(text.encode()).hexdigest()[:12]
    assert digest(chain.text("val")) == "59e330bd230c"
    assert digest(Markov(16, 2, 0).text("val")) == "e41883d34862"
    assert sums.text("val")[:20] == "47+62=109\n95+84=179\n" and digest(sums.text("val")) == "e325548cade0"


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_is_a_distribution(chain):
    p = np.exp(chain.log_prob(everything(3, 5)))
    assert p.sum() == pytest.approx(1)
    for n in (1, 2, 3, 4):  # the marginal is the same wherever it is taken: the text is stationary
        whole = p.reshape(3**n, -1).sum(1)
        np.testing.assert_allclose(chain.ngrams(n), whole, atol=1e-12)
        np.testing.assert_allclose(chain.ngrams(n), p.reshape(-1, 3**n).sum(0), atol=1e-12)
    entropy = lambda n: -(chain.ngrams(n) * np.log(np.maximum(chain.ngrams(n), 1e-300))).sum()
    assert chain.entropy_rate == pytest.approx(entropy(4) - entropy(3))


@pytest.mark.parametrize("chain", [Markov(64, 1, 0), Markov(16, 2, 0)])
def test_text_and_samples_follow_the_chain(chain):
    text = symbols_of(chain, np.frombuffer(chain.text("val").encode(), np.uint8))[None]
    assert text.shape == (1, LENGTHS["val"]) and text.min() >= 0
    for symbols in (text, chain.sample(1024, 64, seed=3)):
        pairs = np.bincount((symbols[:, :-1] * chain.symbols + symbols[:, 1:]).ravel(), minlength=chain.symbols**2)
        assert not pairs[chain.ngrams(2) == 0].any()
        assert abs(pairs / pairs.sum() - chain.ngrams(2)).max() < 4e-3
        steps = symbols.size - len(symbols) * chain.order
        nats = -chain.log_prob(symbols).sum() + len(symbols) * chain.order * np.log(chain.stationary.max())
        assert nats / steps == pytest.approx(chain.entropy_rate, abs=0.1)


@pytest.mark.parametrize("symbols, order", [(2, 1), (4, 2), (94, 1), (16, 2)])
def test_every_chain_is_usable(symbols, order):
    chain = Markov(symbols, order, 0)
    np.testing.assert_allclose(chain.stationary @ chain.moves, chain.stationary, atol=1e-9)
    np.testing.assert_allclose(chain.transitions.sum(1), 1)
    assert chain.transitions[chain.transitions > 0].min() > 5 * FLOOR


@pytest.mark.parametrize("chain", CHAINS)
def test_posterior_of_a_chain_is_that_of_counting(chain):
    every, rows = everything(3, 5), chain.sample(12, 5, seed=1)
    masked = np.random.RandomState(0).random_sample(rows.shape) < 0.6
    masked[0], masked[1] = True, False
    weights = np.exp(chain.log_prob(every))
    found = chain.posterior(rows, masked)
    for row, hidden, p in zip(rows, masked, found, strict=True):
        agreeing = weights * (hidden | (every == row)).all(1)
        for position in np.flatnonzero(hidden):
            wanted = np.bincount(every[:, position], agreeing, minlength=3) / agreeing.sum()
            np.testing.assert_allclose(p[position], wanted, atol=1e-9)


def test_posterior_of_sums():
    sums = Sums(1, 0)
    line = symbols_of(sums, np.frombuffer(b"3+5=08\n4+9=13\n", np.uint8))[None]
    masked = np.zeros(line.shape, bool)
    masked[0, [2, 5, 7, 9, 11, 12]] = True  # 3+?=0?  and  ?+?=??
    masked[0, 13] = True
    p = sums.posterior(line, masked)[0]
    np.testing.assert_allclose(p[2, :10], [1 / 7] * 7 + [0] * 3, atol=1e-6)
    np.testing.assert_allclose(p[5, :10], [0] * 3 + [1 / 7] * 7, atol=1e-6)
    np.testing.assert_allclose(p[11, :2], [0.55, 0.45], atol=1e-6)
    assert p[13, 12] == 1 and p[8, 10] == 1
    line[0, 4] = sums.alphabet.index("1")  # 3+?=1? needs 7, 8 or 9
    np.testing.assert_allclose(sums.posterior(line, masked)[0, 2, 7:10], 1 / 3, atol=1e-6)
    line[0, 3] = sums.alphabet.index("7")  # no true line: what agrees with the most of it
    assert np.isfinite(sums.posterior(line, masked)).all()


def test_held_out_pairs_never_train():
    sums = Sums(2, 0)
    pairs = {}
    for split in ("train", "val"):
        symbols = symbols_of(sums, np.frombuffer(sums.text(split).encode(), np.uint8))[None]
        assert sums.true_lines(symbols).all()
        pairs[split] = sums.pairs(symbols)
    assert not sums.held_out[pairs["train"]].any() and sums.held_out[pairs["val"]].all()
    assert sums.held_out.mean() == 0.1


def test_blocks_hold_symbols_only():
    for spec, length in (("markov:16:1:0", 64), ("sums:2:0", 60)):
        data = load(DataConfig(source=Lab(spec), tokenizer="bytes", seq_len=length, batch_size=4))
        for blocks in (data.train, data.val):
            rows = np.stack([blocks[i] for i in range(0, len(blocks), 50)])
            assert symbols_of(law(spec), rows).min() >= 0
        if spec.startswith("sums"):
            assert law(spec).true_lines(symbols_of(law(spec), rows)).all()


@pytest.mark.parametrize(
    "spec",
    ["markov:64:1", "markov:1:1:0", "markov:95:1:0", "markov:64:2:0", "markov:8:3:0", "sums:3:0", "x:1", "sums:a:0"],
)
def test_unknown_laws(spec):
    with pytest.raises(ValueError, match="got .*wanted") as error:
        Lab(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"tokenizer": "bpe:300"}, "wanted 'bytes'"),
        ({"seq_len": 64}, "multiple of 10"),
        ({"framing": "bos_eos"}, "stream"),
    ],
)
def test_a_block_must_fit_its_law(changed, match):
    with pytest.raises(ValueError, match=match):
        DataConfig(**{"source": Lab("sums:2:0"), "tokenizer": "bytes", "seq_len": 60, "batch_size": 4, **changed})


# ------------------------------------------------------------------------------------------------------------- metrics


def sharpened(chain, count, length, power):
    """Samples of the chain with its transitions to a power: like it, and narrower."""
    other = Markov(chain.symbols, chain.order, chain.seed)
    p = chain.transitions**power
    other.__dict__["transitions"] = p / p.sum(1, keepdims=True)
    return other.sample(count, length, seed=5)


def test_true_samples_are_as_good_as_true_samples():
    chain = Markov(16, 1, 0)
    values = values_of(chain, ids_of(chain, chain.sample(256, 64, seed=99)))
    excess = values["lab_excess_nats"]
    assert abs(excess.mean) < excess.interval < 0.05 and values["lab_impossible"].mean == 0
    for name in ("tv_1", "tv_2", "tv_3", "js_1", "js_2", "js_3", "divergence", "entropy_rate", "entropy_unigram"):
        true = values[f"lab_{name}_true"]
        assert abs(values[f"lab_{name}"].mean - true.mean) < 2 * true.interval, name
    p = chain.ngrams(1)
    assert values["lab_entropy_unigram"].mean == pytest.approx(-(p * np.log(p)).sum(), abs=0.05)


@pytest.mark.parametrize("chain", [Markov(16, 1, 0), Markov(6, 2, 0)])
def test_low_entropy_does_not_look_like_quality(chain):
    values = values_of(chain, ids_of(chain, sharpened(chain, 256, 64, power=2)))
    assert values["lab_excess_nats"].mean < -values["lab_excess_nats"].interval  # a score alone would call it better
    for name in ("divergence", "tv_2", "js_2", "tv_3", "js_3"):
        true = values[f"lab_{name}_true"]
        assert values[f"lab_{name}"].mean > true.mean + 2 * true.interval, name
    narrowed = values["lab_entropy_rate"].mean - chain.entropy_rate
    assert values["lab_excess_nats"].mean == pytest.approx(narrowed + values["lab_divergence"].mean)


def test_shuffled_samples_have_the_right_letters_only():
    chain = Markov(16, 1, 0)
    ids = ids_of(chain, chain.sample(128, 64, seed=7)).ravel()
    values = values_of(chain, np.random.RandomState(0).permutation(ids).reshape(128, 64))
    assert values["lab_tv_1"].mean < values["lab_tv_1_true"].mean + values["lab_tv_1_true"].interval
    assert values["lab_tv_2"].mean > 0.5 and values["lab_impossible"].mean > 0.3 and values["lab_excess_nats"].mean > 2


def test_a_foreign_byte_is_an_impossible_transition():
    chain = Markov(16, 1, 0)
    ids = ids_of(chain, chain.sample(8, 64, seed=0))
    clean, (before, after) = (
        rows_of(chain, ids)["lab_excess_nats"],
        chain.transitions[chain.contexts_of(symbols_of(chain, ids))[0, 9:11], symbols_of(chain, ids)[0, 10:12]],
    )
    for foreign in (10, 256, 257, 1000):  # a newline, EOS, the mask, an id out of range
        ids[0, 10] = foreign
        rows = rows_of(chain, ids)["lab_excess_nats"]
        charged = -2 * np.log(FLOOR) + np.log(before) + np.log(after)
        assert (rows - clean)[0] == pytest.approx(charged / 63) and not (rows - clean)[1:].any()
        values = values_of(chain, ids)
        assert values["lab_impossible"].mean == pytest.approx(2 / (8 * 63))


def test_sums_are_judged_line_by_line():
    sums = Sums(1, 0)
    lines = [b"3+5=08\n", b"3+5=09\n", b"3+5=8 \n", b"9+9=18\n"]
    ids = np.frombuffer(b"".join(lines * 2), np.uint8).astype(int).reshape(2, -1)
    values = values_of(sums, ids)
    assert values["lab_well_formed"].mean == 0.75 and values["lab_untrue"].mean == 0.5
    assert rows_of(sums, ids)["lab_untrue"].tolist() == [0.5, 0.5]
    two_thirds = -(2 * np.log(2 / 3) + np.log(1 / 3)) / 3
    assert values["lab_operand_entropy"].mean == pytest.approx(two_thirds)
    true = sums.sample(512, 28, seed=0)
    values = values_of(sums, ids_of(sums, true))
    assert values["lab_untrue"].mean == 0 and values["lab_true_held_out"].mean == 1
    assert abs(values["lab_held_out"].mean - 0.1) < 1.5 * values["lab_held_out"].interval


@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (4, 3), (64,)])
def test_samples_that_say_nothing(shape):
    with pytest.raises(ValueError, match="samples: got ids of shape"):
        values_of(Markov(16, 1, 0), np.full(shape, 40))


def subject_of(chain, rows=256, length=8):
    """A model without training and blocks of a chain."""
    denoiser = make_denoiser(None, vocab=258)
    tokens = ids_of(chain, chain.sample(rows, length, seed=2)).astype(np.int32)

    def batches(blocks, batch_size):
        for start in range(0, min(blocks, rows), batch_size):
            yield {"tokens": tokens[start : start + batch_size], "valid": np.ones(batch_size, bool)}

    objective = SoftMaskedDiffusion(denoiser, READOUT, 0.0)
    return Subject(objective, make_params(denoiser), np.ones(257, int), batches, sample=lambda: tokens, law=chain)


def test_the_ideal_bound_is_the_entropy_of_a_block():
    """With the true conditionals the bound is tight: any order of unmasking gives the chain rule."""
    chain = Markov(8, 1, 0)
    values = LabLikelihood(blocks=256, batch_size=64, draws=8, chain=0).run(subject_of(chain))
    p = chain.stationary
    entropy = (-(p * np.log(np.maximum(p, 1e-300))).sum() + 7 * chain.entropy_rate) / 8
    ideal = values["nats_per_token_ideal"]
    assert abs(ideal.mean - entropy) < ideal.interval < 0.15
    assert values["lab_gap_one_pass"].mean > 1 and "lab_gap_two_pass" not in values


def test_an_ideal_denoiser_pays_for_few_steps_only():
    chain = Markov(8, 1, 0)
    excess = {}
    for steps in (1, 4, 400):
        values = values_of(chain, ids_of(chain, ideal_samples(chain, 256, 16, steps, seed=0)))
        excess[steps] = values["lab_excess_nats"]
    assert excess[1].mean > excess[4].mean + excess[4].interval > excess[400].mean + 0.1
    assert abs(excess[400].mean) < 1.5 * excess[400].interval  # one token at a time: true samples
    assert abs(values["lab_tv_2"].mean - values["lab_tv_2_true"].mean) < 2 * values["lab_tv_2_true"].interval


def test_evaluators_need_a_known_law():
    subject = subject_of(Markov(8, 1, 0))
    assert LabSamples().run(subject)["lab_impossible"].mean == 0
    assert list(LabSamples().rows(subject)) == ["lab_excess_nats"]
    unknown = Subject(subject.objective, subject.params, subject.token_bytes, subject.batches)
    for metric in (LabSamples(), LabLikelihood()):
        with pytest.raises(ValueError, match="wanted data.source='lab:..'"):
            metric.run(unknown)


# --------------------------------------------------------------------------------------------------------------- study


def study_config(**changed):
    """The smallest study: two runs, two numbers of steps."""
    config = ml_collections.ConfigDict()
    config.model = dict(width=16, depth=1, heads=2, cond=8, vocab_multiple=1)
    config.data = dict(source="lab:markov:4:1:0", tokenizer="bytes", seq_len=8, batch_size=4)
    config.softmask = dict(p_sm=0.5)
    config.optimizer = dict(warmup=0)
    config.train = dict(steps=2, log_every=1, save_every=2)
    config.sampling = dict(count=2, top_p=1.0)
    config.eval = dict(blocks=4, batch_size=4, chain=0)
    runs = dict(binary=dict(softmask=dict(p_sm=0.0)), softmask=dict())
    fields = dict(
        runs=runs,
        baseline="binary",
        grids=dict(nfe=dict(count=64, steps=(2, 4))),
        metrics="lab",
        score="lab_excess_nats",
        show=("lab_tv_2",),
    )
    config.study = {**fields, **changed}
    return config


def test_cells_are_runs_seeds_and_settings():
    made, cells = study.read_study(study_config(seeds=2))
    assert [cell.name for cell in cells][:3] == [
        "binary-seed0-count64-steps2",
        "binary-seed0-count64-steps4",
        "softmask-seed0-count64-steps2",
    ]
    assert len(cells) == 8 and len({cell.name for cell in cells}) == 8
    last = cells[-1]
    assert last.config.sampling.steps == 4 and last.config.sampling.seed == last.config.train.seed == 1
    assert last.trained.sampling.count == 2 and last.config.sampling.count == 64
    assert [cell.config.softmask.p_sm for cell in cells[1:3]] == [0.0, 0.5]


def softened(**changed):
    """A study with a run that samples the binary weights with feedback, and one that begins at them."""
    soft = dict(softmask=dict(p_sm=0.0, soften=True, gate="constant", scale=0.3))
    runs = dict(binary=dict(softmask=dict(p_sm=0.0)), soft=soft, on=dict(softmask=dict(p_sm=1.0)))
    return study_config(**{"runs": runs, "reuse": {"soft": "binary"}, "begin": {"on": "binary"}, **changed})


def test_runs_that_use_the_weights_of_another(tmp_path):
    """Reused weights are trained once, by the other run's settings, and sampled by this one's."""
    made, cells = study.read_study(softened(), tmp_path)
    binary, soft, on = (next(cell for cell in cells if cell.run == run) for run in ("binary", "soft", "on"))
    assert cells.index(on) > cells.index(binary)  # begun at what is there by then
    assert (binary.folder, soft.folder, on.folder) == ("binary-seed0", "binary-seed0", "on-seed0")
    assert soft.name.startswith("soft-seed0") and soft.trained == binary.trained
    assert soft.config.softmask.operator is not None and soft.config.softmask.soften
    assert on.trained.train.init_from == str(tmp_path / "binary-seed0") and not binary.trained.train.init_from
    other = dataclasses.replace(soft, config=binary.config)
    assert other.identity("lab") != soft.identity("lab")  # another gate is another result


@pytest.mark.slow
def test_training_free_and_continued_runs_are_sampled(tmp_path, capsys):
    study.run(softened(), tmp_path)
    assert "6 of 6 cells" in capsys.readouterr().out
    assert not (tmp_path / "soft-seed0").exists() and (tmp_path / "on-seed0" / "summary.json").exists()


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"reuse": {"softmask": "ar"}}, "study.reuse: got 'softmask' after 'ar'"),
        ({"reuse": {"binary": "softmask", "softmask": "binary"}}, "study.reuse: got 'binary' after 'softmask'"),
        ({"begin": {"new": "binary"}}, "study.begin: got 'new'"),
        ({"runs": {"binary": {}}}, "wanted two runs"),
        ({"baseline": "ar"}, "baseline"),
        ({"seeds": 0}, "seeds: got 0"),
        ({"metrics": "mauve"}, "study.metrics: got 'mauve'"),
        ({"plot": True}, "other fields"),
        ({"grids": {"a": {"stepz": 3}}}, "stepz"),
        ({"runs": {"binary": {}, "b": {"softmask": {"p_sm": 2.0}}}}, "p_sm"),
    ],
)
def test_a_bad_study_is_one_line(changed, match):
    with pytest.raises(ValueError, match=match) as error:
        study.read_study(study_config(**changed))
    assert "\n" not in str(error.value)


def test_the_verdict_counts_pairs_and_seeds(tmp_path, monkeypatch):
    """Noise that both runs share drops out of their difference; three seeds that disagree widen its interval."""
    made, cells = study.read_study(study_config(seeds=3))
    random = np.random.RandomState(0)
    shared = {seed: random.normal(1.0, 1.0, 64) for seed in range(3)}
    better = {2: (-0.1, -0.1, -0.1), 4: (-0.6, 0.3, -0.1)}
    for cell in cells:
        gain = better[cell.changed["steps"]][cell.seed] if cell.run == "softmask" else 0.0
        rows = shared[cell.seed] + gain + random.normal(0, 0.02, 64)
        value = {"mean": 0.25, "interval": None, "unit": "", "label": ""}
        result = {"cell": cell.identity("lab"), "forwards": 2, "wall_s": 1.0, "values": {"lab_tv_2": value}}
        write_json(tmp_path / "cells" / f"{cell.name}.json", result | {"rows": {"lab_excess_nats": rows.tolist()}})
    page = study.page(made, cells, tmp_path).splitlines()
    assert "12 of 12 cells, 3 seeds" in page[0]
    differences = {line.split(" | ")[0]: line.split(" | ")[3] for line in page if line.startswith("| count")}
    mean, interval = map(float, differences["| count 64 steps 2"].strip(" |").split(" ± "))
    assert mean == pytest.approx(-0.1, abs=0.01) and interval < 0.02
    mean, interval = map(float, differences["| count 64 steps 4"].strip(" |").split(" ± "))
    assert mean == pytest.approx(-0.13, abs=0.01) and interval > 1
    assert "softmask better than binary beyond the interval at: count 64 steps 2." in page
    monkeypatch.setattr(study, "WIDE", 1)  # a line for each run instead of a column
    lines = {line.split(" | ")[0]: line.split(" | ")[1:] for line in study.page(made, cells, tmp_path).splitlines()[:7]}
    assert lines["| run"] == ["count 64 steps 2", "count 64 steps 4 |"] and "(" not in lines["| binary"][0]
    assert lines["| softmask"][0].endswith(f"({differences['| count 64 steps 2'].strip(' |')})")
    (tmp_path / "cells" / f"{cells[0].name}.json").write_text('{"cell"')  # cut off: it is missing, not an error
    assert "11 of 12 cells" in study.page(made, cells, tmp_path)


@pytest.mark.slow
def test_a_killed_study_continues(tmp_path, monkeypatch, capsys):
    study.run(study_config(), tmp_path)
    printed = capsys.readouterr().out
    assert "4 of 4 cells" in printed and (tmp_path / "study.md").read_text() in printed
    files = sorted((tmp_path / "cells").glob("*.json*"))
    assert len(files) == 8
    before = {file.name: file.read_text() for file in files}
    (tmp_path / "cells" / "softmask-seed0-count64-steps4.json").unlink()
    monkeypatch.setattr(study, "build", None)  # nothing is trained again
    study.run(study_config(), tmp_path)
    assert "0 of 4 left" in capsys.readouterr().out
    for file in files:
        got, wanted = ([json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)
                       for text in (file.read_text(), before[file.name]))  # fmt: skip
        if file.suffix == ".json":
            del got["wall_s"], wanted["wall_s"]
        assert got == wanted


@pytest.mark.slow
def test_soft_masking_brings_samples_nearer_to_the_truth(tmp_path):
    """The effect of the paper at the size of a test: beyond the interval, and by a tenth of a nat per token."""
    config = lab_config.get_config()
    config.model.update(width=64, depth=2, heads=2)
    config.data.update(source="lab:markov:16:1:0", seq_len=32)
    config.train.update(steps=300, log_every=100, save_every=300)
    config.eval = dict(blocks=64, batch_size=64, chain=0)
    config.sampling.update(count=256, steps=32)
    config.study.grids = dict(nfe=dict(count=256, steps=32))
    study.run(config, tmp_path)
    result = lambda name: json.loads((tmp_path / "cells" / f"{name}.json").read_text())
    rows = {
        run: np.array(result(f"{run}-seed0-count256-steps32")["rows"]["lab_excess_nats"]) for run in config.study.runs
    }
    gain, interval = ratio(rows["binary"] - rows["softmask"], np.ones(256))
    assert gain - interval > 0.1
    assert (
        "softmask better than binary beyond the interval at: count 256 steps 32." in (tmp_path / "study.md").read_text()
    )
