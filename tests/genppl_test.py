"""Generative perplexity with a tiny causal model as scorer, against the same number worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_denoiser, make_params

from smdlm.data.tokenizer import make_tokenizer
from smdlm.evaluate.genppl import GenerativePerplexity, Scorer, windows
from smdlm.evaluate.samples import Samples

BYTES = make_tokenizer("bytes")
EOS = BYTES.eos_id
LENGTH = 10


def make_scorer(length=LENGTH, **model):
    denoiser = make_denoiser(None, vocab=258, causal=True, **model)
    return Scorer("judge", denoiser, make_params(denoiser), BYTES, length, "weights")


@pytest.fixture(scope="module")
def scorer():
    return make_scorer()


def own(*rows):
    """Samples in the scorer's own ids."""
    ids = np.array(rows, np.int32)
    return Samples(tuple(BYTES.decode(row) for row in ids), ids, BYTES.fingerprint)


def rows(count, length, seed=0):
    return np.random.default_rng(seed).integers(97, 122, (count, length)).tolist()


def log_probs(scorer, ids):
    """[n, V] of one row of ids, by the dense way; position i predicts token i + 1."""
    hidden = scorer.denoiser(scorer.params, jnp.asarray([ids], jnp.int32))
    return np.asarray(jax.nn.log_softmax(scorer.denoiser.head(scorer.params).logits(hidden)))[0]


def by_hand(scorer, ids, context=None):
    """nll of tokens 1 .. n - 1, each with `context` tokens before it, all by default."""
    starts = [max(0, i - (context or i)) for i in range(1, len(ids))]
    return [-log_probs(scorer, ids[s:i])[-1, ids[i]] for i, s in enumerate(starts, 1)]


def test_perplexity_and_entropy_in_one_row(scorer):
    ids = rows(5, 8)
    values = GenerativePerplexity(scorer, batch_size=2).run(own(*ids))
    nll = np.array([sum(by_hand(scorer, row)) for row in ids])
    ppl = values["generative_perplexity"]
    np.testing.assert_allclose(ppl.amounts, nll, rtol=1e-5)
    assert ppl.sizes.tolist() == [7] * 5 and ppl.mean == pytest.approx(np.exp(nll.sum() / 35), rel=1e-5)
    assert values["sample_entropy"].label == ppl.label == "scored by judge"
    for batch_size in (1, 8):
        again = GenerativePerplexity(scorer, batch_size=batch_size).run(own(*ids))
        assert again["generative_perplexity"].mean == pytest.approx(ppl.mean, rel=1e-5)


def test_windows_score_every_token_once():
    for length in range(1, 30):
        for window, stride in ((2, 1), (5, 4), (6, 3), (10, 1)):
            found = windows(0, length, window, stride)
            assert [i for w in found for i in range(w.first, w.end)] == list(range(1, length))
            assert all(w.end - w.start <= window and w.first > w.start for w in found)
            assert all(w.first - w.start >= window - stride for w in found[1:])
    assert [tuple(w) for w in windows(3, 7, 4, 2)] == [(3, 0, 1, 4), (3, 2, 4, 6), (3, 4, 6, 7)]


def test_long_samples_move_through_windows(scorer):
    ids = rows(2, 17)
    got = GenerativePerplexity(scorer, window=6, stride=1).run(own(*ids))["generative_perplexity"].amounts
    # tokens 1 .. 5 see all before them, the others the five before them
    wanted = [sum(by_hand(scorer, row[:6])) + sum(by_hand(scorer, row, 5)[5:]) for row in ids]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    half = GenerativePerplexity(scorer, window=6).run(own(*ids))["generative_perplexity"]
    explicit = GenerativePerplexity(scorer, window=6, stride=3).run(own(*ids))["generative_perplexity"]
    assert half.mean == explicit.mean and half.sizes.tolist() == [16, 16] and half.mean != np.exp(sum(got) / 32)


def test_truncation(scorer):
    ids = rows(3, 9)
    cut = GenerativePerplexity(scorer, truncate=4).run(own(*ids))["generative_perplexity"]
    whole = GenerativePerplexity(scorer).run(own(*[row[:4] for row in ids]))["generative_perplexity"]
    np.testing.assert_allclose(cut.amounts, whole.amounts, rtol=1e-5)


def test_bos_gives_the_first_token_a_context(scorer):
    ids = rows(1, 5)[0]
    got = GenerativePerplexity(scorer, bos=True).run(own(ids))["generative_perplexity"]
    np.testing.assert_allclose(got.amounts, [sum(by_hand(scorer, [EOS, *ids]))], rtol=1e-5)
    assert got.sizes.tolist() == [5]
    already = GenerativePerplexity(scorer, bos=True).run(own([EOS, *ids]))["generative_perplexity"]
    np.testing.assert_allclose(already.amounts, got.amounts, rtol=1e-6)


@pytest.mark.parametrize(
    "eos, row, counted",
    [
        ("all", [97, EOS, 98, EOS, 99], [1, 2, 3, 4]),
        ("first", [97, EOS, 98, EOS, 99], [1, 2, 4]),
        ("stop", [97, EOS, 98, EOS, 99], [1]),
        ("first", [EOS, 97, EOS, 98, EOS], [1, 3]),  # the BOS at the front is the first
        ("stop", [EOS, 97, EOS, 98, EOS], [1, 2]),
        ("all", [EOS, 97, EOS, 98, EOS], [1, 2, 3, 4]),
    ],
)
def test_which_ends_count(scorer, eos, row, counted):
    got = GenerativePerplexity(scorer, eos=eos).run(own(row))["generative_perplexity"]
    nll = by_hand(scorer, row)
    np.testing.assert_allclose(got.amounts, [sum(nll[i - 1] for i in counted)], rtol=1e-5)
    assert got.sizes.tolist() == [len(counted)]


def test_another_tokenizer_is_read_as_text_and_the_label_says_so(scorer):
    theirs = Samples(("ab c", "é", ""), np.zeros((3, 2), np.int32), "another")
    value = GenerativePerplexity(scorer).run(theirs)["generative_perplexity"]
    wanted = [sum(by_hand(scorer, list(text.encode()))) for text in theirs.texts]
    np.testing.assert_allclose(value.amounts, wanted, rtol=1e-5)
    assert value.sizes.tolist() == [3, 1, 0] and value.label == "scored by judge, text re-tokenised"


def test_goes_on_where_it_was(scorer, tmp_path):
    metric, samples = GenerativePerplexity(scorer, batch_size=2), own(*rows(5, 6))
    samples = dataclasses.replace(samples, cache=tmp_path)
    first = metric.run(samples)["generative_perplexity"]
    assert len(list(tmp_path.iterdir())) == 3
    broken = dataclasses.replace(scorer, params=jax.tree.map(jnp.zeros_like, scorer.params))
    again = dataclasses.replace(metric, scorer=broken).run(samples)["generative_perplexity"]
    assert again.mean == first.mean  # nothing was computed: the facts name the same weights
    other = dataclasses.replace(metric, scorer=dataclasses.replace(broken, fingerprint="other"))
    assert other.run(samples)["generative_perplexity"].mean == pytest.approx(257, rel=1e-4)  # a flat scorer, SUBS


def test_bad_input_is_one_line(scorer):
    run = GenerativePerplexity(scorer).run
    with pytest.raises(ValueError, match="got masks in sample 1"):
        run(own([97, 98], [97, BYTES.mask_id]))
    with pytest.raises(ValueError, match="got no token to score"):
        run(Samples(("a", ""), np.zeros((2, 1), np.int32), "another"))
    nan = dataclasses.replace(scorer, params=jax.tree.map(lambda x: x * jnp.nan, scorer.params))
    with pytest.raises(ValueError, match="got a score of nan for sample 0"):
        GenerativePerplexity(nan).run(own([97, 98]))
    bidirectional = make_denoiser(None, vocab=258)
    with pytest.raises(ValueError, match="not causal"):
        dataclasses.replace(scorer, denoiser=bidirectional)


@pytest.mark.parametrize(
    "fields",
    [{"window": 1}, {"window": 11}, {"stride": 10}, {"window": 4, "stride": 4}, {"eos": "last"}, {"batch_size": 0},
     {"truncate": -1}],
)  # fmt: skip
def test_fields_out_of_range(scorer, fields):
    with pytest.raises(ValueError, match="generative perplexity: got"):
        GenerativePerplexity(scorer, **fields)
