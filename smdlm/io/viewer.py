"""Recorded runs as something to look at: one page that plays them (.html), or an animated picture (.svg).

The page is io/page/: page.html with page.css, page.js and the runs as JSON put into it, so that one file is all there
is and nothing is loaded from anywhere. What the JSON holds:

    words: the distinct tokens' texts; elsewhere a token is its number in this list, -1 for the mask
    candidates: K
    runs[].tokens[frame][position], .settled[position], .prompt[position], .forwards[frame]
    runs[].soft: whether masks are shown a mix; .fed: whether predictions are fed back at all
    runs[].computed[frame]: [first, end) of the positions that its step computed, the others' being cached
    runs[].seen[frame]: for each masked position, in order, -1 without a prediction, else
        entropy x 100, lambda x 10000, and K pairs of word and probability x 10000
"""

from __future__ import annotations

import dataclasses
import html
import importlib.resources
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smdlm import files
from smdlm.io import animation
from smdlm.sampling.trace import Trace

Word = Callable[[int], str]  # text of a token


@dataclasses.dataclass(frozen=True)
class Page:
    """A page as text; a notebook shows it in a frame."""

    html: str = dataclasses.field(repr=False)

    def _repr_html_(self) -> str:
        content = html.escape(self.html, quote=True)
        return f'<iframe srcdoc="{content}" title="denoising run" style="width:100%;height:720px;border:0"></iframe>'


@dataclasses.dataclass(frozen=True)
class Show:
    """What is shown: runs of one canvas length and one vocabulary, side by side.

    Attributes:
      runs: {name: recorded run}.
      words: text of a token id.
      title: heading. settings: one line below it.
    """

    runs: Mapping[str, Trace]
    words: Word
    title: str = "Masks becoming text"
    settings: str = ""

    def __post_init__(self):
        sizes = {trace.tokens.shape[1] for trace in self.runs.values()}
        if len(sizes) != 1:
            raise ValueError(f"viewer: got runs of {sorted(sizes)} positions, wanted at least one, all of one length")


def words_of(tokenizer: Any) -> Word:
    """The text of a token of a `Tokenizer`, with a name for those that stand for none."""

    def word(token: int) -> str:
        if token in (tokenizer.eos_id, tokenizer.bos_id):
            return "\u27e8end\u27e9\n"
        piece = tokenizer.pieces[token] if token < len(tokenizer.pieces) else b""
        return piece.decode("utf-8", errors="replace") or f"\u27e8{token}\u27e9"

    return word


def check_path(field: str, path: str) -> None:
    """ValueError unless it is a local path whose ending is known."""
    if files.local_path(field, path).suffix not in WRITERS:
        raise ValueError(f"{field}: got {path!r}, wanted a file that ends in {' or '.join(WRITERS)}")


def write(path: Path, show: Show) -> None:
    """Writes a show as what the path's ending says, whole or not at all."""
    check_path("viewer", str(path))
    files.write(path, WRITERS[path.suffix](show))


def page(show: Show) -> str:
    """The page, 570 kB for two runs of 256 positions and 64 steps."""
    text = _part("page.html")
    content = {
        "title": html.escape(show.title),
        "settings": html.escape(show.settings),
        "style": _part("page.css"),
        "data": json.dumps(payload(show), separators=(",", ":")).replace("<", "\\u003c"),  # no </script> in a token
        "script": _part("page.js"),
    }
    for name, value in content.items():
        text = text.replace(f"@{name}@", value)
    return text


def _part(name: str) -> str:
    return importlib.resources.files("smdlm.io").joinpath("page", name).read_text("utf-8")


def payload(show: Show) -> dict[str, Any]:
    """The JSON of a page; see the head of this file."""
    used = np.unique(np.concatenate([_used(trace) for trace in show.runs.values()]))
    number = {int(token): i for i, token in enumerate(used)}
    candidates = min(trace.ids.shape[-1] for trace in show.runs.values())
    return {
        "words": [show.words(int(token)) for token in used],
        "candidates": candidates,
        "runs": [_run(name, trace, number, candidates) for name, trace in show.runs.items()],
    }


def _used(trace: Trace) -> np.ndarray:
    """Token ids that a page has to name."""
    return np.concatenate([trace.tokens[~trace.masked], trace.ids[trace.predicted].reshape(-1)])


def _run(name: str, trace: Trace, number: Mapping[int, int], candidates: int) -> dict[str, Any]:
    masked = trace.masked
    soft = bool(trace.lam.any())
    settled = trace.settled
    written = settled[~trace.prompt]
    half = int(np.median(written)) if written.size else 0
    seen = []
    for frame in range(len(trace.tokens)):
        flat: list[int] = []
        for place in np.flatnonzero(masked[frame]):
            flat += _numbers(trace, frame, place, number, candidates) if trace.predicted[frame, place] else [-1]
        seen.append(flat)
    return {
        "name": name,
        "note": f"half of the tokens settled by step {half}",
        "soft": soft,
        "fed": trace.fed_back,
        "again": bool(np.any(masked[1:] & ~masked[:-1])),
        "tokens": [[-1 if m else number[t] for t, m in zip(*row, strict=True)] for row in _rows(trace.tokens, masked)],
        "seen": seen,
        "settled": settled.tolist(),
        "prompt": trace.prompt.astype(int).tolist(),
        "forwards": trace.forwards.tolist(),
        "computed": trace.computed.tolist(),
    }


def _rows(*arrays: np.ndarray) -> list[tuple[list, ...]]:
    return list(zip(*(array.tolist() for array in arrays), strict=True))


def _numbers(trace: Trace, frame: int, place: int, number: Mapping[int, int], candidates: int) -> list[int]:
    """The numbers of one masked position."""
    flat = [round(100 * float(trace.entropy[frame, place])), round(1e4 * float(trace.lam[frame, place]))]
    ids, probs = trace.ids[frame, place, :candidates], trace.probs[frame, place, :candidates]
    for token, prob in zip(ids, probs, strict=True):
        flat += [number[int(token)], round(1e4 * float(prob))]
    return flat


def picture(show: Show) -> str:
    """An animated SVG."""
    return animation.svg(show.runs, show.words, show.title)


WRITERS: dict[str, Callable[[Show], str]] = {".html": page, ".svg": picture}
