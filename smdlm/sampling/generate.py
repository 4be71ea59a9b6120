"""Prompts in, texts out: what is asked for, the canvases it becomes, and what of a filled canvas is the answer.

A prompt is padded on the left to a multiple of `bucket`, so that few programs are compiled, and by its own length
alone, so that its answer does not depend on who shares its batch. A batch that is not full is filled with rows that
stand still: one program, and the same numbers, for every batch.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from smdlm.data.chat import ChatTemplate, end_of_turn, render
from smdlm.data.vocabulary import Tokenizer
from smdlm.mesh.arrays import fetch
from smdlm.sampling import blocks
from smdlm.sampling.blocks import BlockDecoder, Forward

HOLE = "[MASK]"
FIELDS = {
    **{"prompt": str, "suffix": str, "prefix": str, "messages": list, "stop": list},
    **{"tokens": int, "seed": int, "id": (str, int)},
}
KINDS_OF_FIELDS = {str: "a text", list: "a list", int: "a whole number", (str, int): "a text or a whole number"}


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """config.generate; policy, steps, filters and feedback are those of config.sampling.

    Attributes:
      new_tokens: masks behind a prompt.
      batch_size: rows of a program.
      bucket: prompts are padded to a multiple of it.
      block, cache, ahead, parity: of `BlockDecoder`. An infill is one block without a cache.
    """

    new_tokens: int = 128
    batch_size: int = 8
    bucket: int = 64
    block: int = 0
    cache: str = "none"
    ahead: int = 1
    parity: bool = False

    def __post_init__(self):
        for name in ("new_tokens", "batch_size", "bucket"):
            if getattr(self, name) < 1:
                raise ValueError(f"generate.{name}: got {getattr(self, name)}, wanted at least 1")
        blocks.check_fields(self.block, self.cache, self.ahead)
        if self.block and self.new_tokens % self.block:
            raise ValueError(
                f"generate.block: got {self.block} for generate.new_tokens = {self.new_tokens}, wanted a divisor, or 0"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One thing asked for.

    Attributes:
      given: as it was asked. ids: [n] i32; of an infill with masks at its holes.
      seed: of its noise, which it does not share. stop: texts that end the answer, ends: ids that do.
    """

    given: Mapping[str, Any]
    ids: np.ndarray
    infill: bool
    seed: int
    stop: tuple[str, ...]
    ends: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What came of a prompt.

    Attributes:
      text: of the answer; of an infill the whole text. ids: the new tokens, [n] i32, without what ended them.
      forwards: passes that the row took part in. finish: 'end' (one of `Prompt.ends`), 'stop' or 'length'.
    """

    prompt: Prompt
    text: str
    ids: np.ndarray
    forwards: int
    finish: str


@dataclasses.dataclass(frozen=True, eq=False)
class Generated:
    """All answers in the order of the prompts, and what they took: forward passes really run, FLOPs, seconds."""

    answers: list[Answer]
    forwards: int
    flops: float
    seconds: float

    @property
    def tokens(self) -> int:
        """New tokens, without prompts, padding and what follows an end."""
        return sum(len(answer.ids) for answer in self.answers)

    def summary(self) -> dict[str, float]:
        """What is reported; a forward pass counts once for every row that took part in it."""
        taken = sum(answer.forwards for answer in self.answers)
        return {
            "answers": len(self.answers),
            "tokens": self.tokens,
            "forwards": self.forwards,
            "tokens_per_forward": self.tokens / max(taken, 1),
            "tokens_per_s": self.tokens / self.seconds,
            "flops_per_token": self.flops / max(self.tokens, 1),
            "seconds": self.seconds,
        }


# --------------------------------------------------------------------------------------------------- what is asked for


def parse(record: Any, tokenizer: Tokenizer, seed: int, where: str) -> Prompt:
    """A prompt from a JSON object.

    {"prompt": text} is continued; where it holds '[MASK]', each becomes `tokens` masks (1) and nothing is appended;
    {"prompt", "suffix", "tokens"} puts them between the two. {"messages": [..]} is a chat, whose answer begins with
    "prefix". With all of them: "seed", "stop" (a list of texts), "id".

    Raises:
      ValueError: one line, which begins with `where`; an unknown field, no text, another type.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: got {record!r}, wanted an object with 'prompt' or 'messages'")
    for name, value in record.items():
        if name not in FIELDS:
            raise ValueError(f"{where}: got {name!r}: {value!r}, wanted fields of {', '.join(FIELDS)}")
        if not isinstance(value, FIELDS[name]) or isinstance(value, bool):
            raise ValueError(f"{where}: got {name!r}: {value!r}, wanted {KINDS_OF_FIELDS[FIELDS[name]]}")
    if ("prompt" in record) == ("messages" in record):
        raise ValueError(f"{where}: got {sorted(record)}, wanted either 'prompt' or 'messages'")
    stop = tuple(record.get("stop", ()))
    if not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"{where}: got 'stop': {record['stop']!r}, wanted a list of texts")
    for name, least, most in (("tokens", 1, 2**20), ("seed", 0, 2**32 - 1)):
        if not least <= record.get(name, least) <= most:
            raise ValueError(f"{where}: got {name!r}: {record[name]}, wanted {least} to {most}")
    ends, seed = (tokenizer.eos_id,), record.get("seed", seed)
    try:
        if "messages" in record:
            return Prompt(record, *_chat(record, tokenizer), seed, stop, (*ends, *_ends_of_turns(tokenizer)))
        return Prompt(record, *_text(record, tokenizer), seed, stop, ends)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def continued(text: str, tokenizer: Tokenizer, seed: int) -> Prompt:
    """A text that is continued, whatever it holds: '[MASK]' in it is text, and an empty one is the start of a document.

    For programs whose texts are not written for us; `parse` reads what is asked of this library.
    """
    ids = tokenizer.encode(text) if text else np.zeros(0, np.int32)
    ids = ids if len(ids) else np.array([tokenizer.bos_id])
    return Prompt({"prompt": text}, ids.astype(np.int32), False, seed, (), (tokenizer.eos_id,))


def _chat(record: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[np.ndarray, bool]:
    if wrong := {"suffix", "tokens"} & set(record):
        raise ValueError(f"got {sorted(wrong)} for a chat, wanted 'messages' and 'prefix'")
    return render(_template(tokenizer), record["messages"], answer=True, prefix=record.get("prefix", "")), False


@functools.lru_cache(maxsize=4)
def _template(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate.of(tokenizer)


@functools.lru_cache(maxsize=4)
def _ends_of_turns(tokenizer: Tokenizer) -> list[int]:
    return end_of_turn(_template(tokenizer))


def _text(record: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[np.ndarray, bool]:
    """(ids with masks for holes, whether there are any)."""
    if "prefix" in record:
        raise ValueError("got 'prefix' without 'messages', wanted it in the prompt itself")
    text, infill = record["prompt"], "suffix" in record or HOLE in record["prompt"]
    if not text:
        raise ValueError("got an empty prompt, wanted at least one character")
    if "tokens" in record and not infill:
        raise ValueError(f"got 'tokens' without {HOLE} or 'suffix', wanted generate.new_tokens")
    pieces = text.split(HOLE)
    if "suffix" in record:
        if len(pieces) > 1 or "tokens" not in record:
            raise ValueError(f"got a suffix, wanted 'tokens' for what lies before it, and no {HOLE}")
        pieces.append(record["suffix"])
    hole = np.full(record.get("tokens", 1), tokenizer.mask_id, np.int32)
    parts = [tokenizer.encode(pieces[0])]
    for piece in pieces[1:]:
        parts += [hole, tokenizer.encode(piece)]
    return np.concatenate(parts).astype(np.int32), infill


# ---------------------------------------------------------------------------------------------------------- canvases


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Prompts of one shape: canvas [B, L] i32, seen [B, L] bool, where the first block begins, most forward passes.

    numbers: of the prompts; rows behind them stand still.
    """

    numbers: list[int]
    canvas: np.ndarray
    seen: np.ndarray
    first: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Generator:
    """Answers prompts.

    Attributes:
      decoder: for continuations. length: positions of the longest canvas. steps: most forward passes of a canvas.
      place: puts host arrays on the devices.
    """

    decoder: BlockDecoder
    tokenizer: Tokenizer
    config: GenerateConfig
    length: int
    steps: int
    place: Callable[[Any], Any] = lambda x: x

    def __call__(self, params: Any, prompts: Sequence[Prompt]) -> Generated:
        """ValueError, one line, before anything is computed: a prompt that does not fit."""
        batches, answers = self.batches(prompts), {}
        begin, count, flops = time.monotonic(), 0, 0.0
        for batch in batches:
            run = self.run(params, batch, prompts)
            answers |= zip(batch.numbers, run.answers, strict=True)
            count, flops = count + run.forwards, flops + run.flops
        return Generated([answers[i] for i in range(len(prompts))], count, flops, time.monotonic() - begin)

    def batches(self, prompts: Sequence[Prompt]) -> list[Batch]:
        """All canvases, those of one shape together."""
        groups: dict[tuple[int, int, int], list[int]] = {}
        for number, prompt in enumerate(prompts):
            groups.setdefault(self.shape(prompt, number), []).append(number)
        size = self.config.batch_size
        return [
            self.batch(shape, numbers[i : i + size], prompts)
            for shape, numbers in groups.items()
            for i in range(0, len(numbers), size)
        ]

    def shape(self, prompt: Prompt, number: int) -> tuple[int, int, int]:
        """(L, where the first block begins, most forward passes) of a prompt's canvas."""
        new = 0 if prompt.infill else self.config.new_tokens
        if len(prompt.ids) + new > self.length:
            raise ValueError(
                f"prompt {number + 1}: got {len(prompt.ids)} tokens and {new} new ones, wanted at most {self.length} "
                "together (data.seq_len): a shorter prompt, or a smaller generate.new_tokens"
            )
        room = min(self.length - new, -(-len(prompt.ids) // self.config.bucket) * self.config.bucket)
        if prompt.infill:
            return room, 0, min(self.steps, int(np.sum(prompt.ids == self.tokenizer.mask_id)))
        return room + new, room, self.steps

    def batch(self, shape: tuple[int, int, int], numbers: list[int], prompts: Sequence[Prompt]) -> Batch:
        length, first, steps = shape
        canvas = np.full((self.config.batch_size, length), self.tokenizer.eos_id, np.int32)
        seen = np.zeros(canvas.shape, bool)
        for row in range(len(canvas)):
            ids = prompts[numbers[row % len(numbers)]].ids
            end = first or length
            canvas[row, end - len(ids) : end], canvas[row, end:] = ids, self.tokenizer.mask_id
            seen[row, end - len(ids) :] = True
        return Batch(numbers, canvas, seen, first, steps)

    def forwards(self, params: Any, batch: Batch, prompts: Sequence[Prompt]) -> Iterator[Forward]:
        """The passes of one batch."""
        seeds = [prompts[batch.numbers[row % len(batch.numbers)]].seed for row in range(len(batch.canvas))]
        keys = jax.vmap(jax.random.key)(np.array(seeds, np.uint32))

        def stopped(canvas: np.ndarray) -> np.ndarray:
            rows = [self.has_ended(prompts[n], canvas[row, batch.first :]) for row, n in enumerate(batch.numbers)]
            return np.array(rows + [True] * (len(canvas) - len(rows)))

        decoder = self.decoder if batch.first else dataclasses.replace(self.decoder, block=0, cache="none")
        canvas, seen = self.place(batch.canvas), self.place(batch.seen)
        return decoder.forwards(params, keys, canvas, seen, batch.first, batch.steps, stopped)

    def run(self, params: Any, batch: Batch, prompts: Sequence[Prompt]) -> Generated:
        begin, taken, sizes, read = time.monotonic(), np.zeros(len(batch.canvas), int), [], 0
        canvas = batch.canvas
        for forward in self.forwards(params, batch, prompts):
            taken += forward.waiting
            sizes.append(forward.size)
            canvas, read = forward.after.canvas, forward.after.read
        filled = fetch(canvas)
        answers = [
            self.answer(prompts[number], batch.canvas[row], filled[row], batch.first, int(taken[row]))
            for row, number in enumerate(batch.numbers)
        ]
        flops = self.decoder.flops(batch.canvas.shape, sizes, int(read))
        return Generated(answers, len(sizes), flops, time.monotonic() - begin)

    # -------------------------------------------------------------------------------------------------------- answers

    def known(self, new: np.ndarray) -> np.ndarray:
        """The new tokens up to the first mask."""
        masked = new == self.tokenizer.mask_id
        return new[: int(np.argmax(masked)) if masked.any() else len(new)]

    def has_ended(self, prompt: Prompt, new: np.ndarray) -> bool:
        """Whether what is known from the left on holds an end, so that nothing behind it counts."""
        if prompt.infill:
            return False
        known = self.known(new)
        return bool(np.isin(known, prompt.ends).any()) or _ends_at(self.tokenizer, known, prompt.stop) is not None

    def answer(self, prompt: Prompt, before: np.ndarray, after: np.ndarray, first: int, forwards: int) -> Answer:
        if prompt.infill:
            text = self.tokenizer.decode(after[len(after) - len(prompt.ids) :])
            return Answer(prompt, text, after[before == self.tokenizer.mask_id], forwards, "length")
        ids, finish = self.known(after[first:]), "length"
        ended = np.isin(ids, prompt.ends)
        if ended.any():
            ids, finish = ids[: int(np.argmax(ended))], "end"
        text = self.tokenizer.decode(ids)
        if (count := _ends_at(self.tokenizer, ids, prompt.stop)) is not None:
            text, ids, finish = text[: _first(text, prompt.stop)], ids[:count], "stop"
        return Answer(prompt, text, ids, forwards, finish)


def _first(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the texts begins."""
    return min((at for at in (text.find(end) for end in stop) if at >= 0), default=None)


def _ends_at(tokenizer: Tokenizer, ids: np.ndarray, stop: Sequence[str]) -> int | None:
    """Number of tokens after which one of the texts is there."""
    if not stop or _first(tokenizer.decode(ids), stop) is None:
        return None
    low, high = 0, len(ids)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _first(tokenizer.decode(ids[:middle]), stop) is not None else (middle, high)
    return high
