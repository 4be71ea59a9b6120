"""Recorded runs as an animated SVG, for places that run no script, such as a README.

Every text and box of the picture has a track: its opacity over the frames. Equal tracks share one CSS animation. A
reader who prefers reduced motion sees the end of the run.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from smdlm.sampling.trace import Trace

COLUMNS = 46  # characters of a panel's line
CHAR, LINE, SIZE = 8.4, 24, 14  # width of a character, distance of lines and font size, in pixels
PLAYED, HELD = 9.0, 3.0  # seconds: of the run, of its end
TINTS = 4  # a candidate's ink is rounded to so many shades

Track = tuple[tuple[int, float], ...]  # (frame, opacity from there on)

STYLE = """
svg{--paper:#fff;--ink:#1f2328;--quiet:#57606a;--line:#dad7cf;--soft:#0b5a8f;--plain:#8f4a06;--mask:#d5d2c9}
@media(prefers-color-scheme:dark){svg{--paper:#161a1e;--ink:#e6e3dc;--quiet:#a3abb3;--line:#343a41;--soft:#84c0ee;
--plain:#e5a862;--mask:#3a4148}}
.paper{fill:var(--paper);stroke:var(--line)}.mask{fill:var(--mask)}.ink{fill:var(--ink)}.guess{fill:var(--soft)}
.soft{fill:var(--soft)}.plain{fill:var(--plain)}.quiet{fill:var(--quiet)}.given{text-decoration:underline dotted}
.bar{fill:var(--soft);transform-box:fill-box}
text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono","Liberation Mono",monospace;
white-space:pre}
.name,.quiet{font:600 14px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
.quiet{font-weight:400;font-size:12px}
[class*=k]{animation-iteration-count:infinite;animation-timing-function:step-end}
@media(prefers-reduced-motion:reduce){*{animation:none!important}}
"""


@dataclasses.dataclass(frozen=True)
class _Spot:
    """Where a token stands: what is shown of it, and its line and column in the panel."""

    text: str
    line: int
    column: int


def split(text: str) -> tuple[str, str, str]:
    """(blanks before, what is shown, blanks behind) of a token; a token of line breaks shows a sign for them."""
    core = text.strip()
    if core:
        before, _, behind = text.partition(core)
        return before, core, behind
    return ("", "\u21b5", text) if "\n" in text else ("", "\u2423" * len(text), "")


def svg(runs: Mapping[str, Trace], words: Callable[[int], str], title: str) -> str:
    """The picture, panels side by side."""
    frames = max(len(trace.tokens) for trace in runs.values())
    fullest = max(float(trace.lam.max()) for trace in runs.values())
    animations: dict[Track, str] = {}
    panels, deepest = [], 0
    wide = COLUMNS * CHAR + 32
    for i, (name, trace) in enumerate(runs.items()):
        spots = _laid_out([words(t) if t != trace.mask_id else "\u2003" for t in trace.tokens[-1].tolist()])
        deepest = max(deepest, max(spot.line for spot in spots) + 1)
        inside = "".join(_position(trace, words, spots, place, fullest, animations) for place in range(len(spots)))
        kind = "soft" if trace.lam.any() else "plain"
        heading = f'<text class="name {kind}" x="0" y="-22">{html.escape(name)}</text>'
        panels.append(f'<g transform="translate({16 + i * wide:.0f} 58)">{heading}{inside}</g>')
    width, height = wide * len(runs), 58 + LINE * deepest + 34
    foot = "candidates appear over a mask as \u03bb grows" if fullest else ""
    seconds = PLAYED + HELD
    style = [STYLE, f'[class*="k"]{{animation-duration:{seconds:g}s}}']
    style += [
        f".{name}{{animation-name:{name}}}@keyframes {name}{_keyframes(t, frames)}" for t, name in animations.items()
    ]
    end = 100 * PLAYED / seconds
    style.append(f".bar{{animation:run {seconds:g}s linear infinite}}@keyframes run{{0%{{transform:scaleX(0)}}")
    style.append(f"{end:.1f}%,100%{{transform:scaleX(1)}}}}")
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
            f'height="{height}" role="img" aria-labelledby="title desc"><title id="title">{html.escape(title)}</title>',
            f'<desc id="desc">{html.escape(_described(runs, words))}</desc><style>{"".join(style)}</style>',
            f'<rect class="paper" x=".5" y=".5" width="{width - 1:.0f}" height="{height - 1}" rx="10"/>',
            *panels,
            f'<text class="quiet" x="16" y="{height - 16}">{html.escape(foot)}</text>',
            f'<rect class="bar" x="16" y="{height - 8}" width="{width - 32:.0f}" height="2"/></svg>\n',
        ]
    )


def _described(runs: Mapping[str, Trace], words: Callable[[int], str]) -> str:
    """The ends of the runs, for a reader who hears the picture."""
    ends = ("".join(words(t) for t in trace.tokens[-1].tolist() if t != trace.mask_id) for trace in runs.values())
    return "; ".join(f"{name}: {' '.join(end.split())}" for name, end in zip(runs, ends, strict=True))


def _laid_out(texts: Sequence[str]) -> list[_Spot]:
    """Lines broken at blanks, so that no word is cut unless it is longer than a line."""
    parts = [split(text) for text in texts]
    spots: list[_Spot] = []
    line = column = 0

    def blanks(text: str) -> None:
        nonlocal line, column
        breaks = text.count("\n")
        line, column = (line + breaks, len(text) - text.rindex("\n") - 1) if breaks else (line, column + len(text))

    for i, (before, core, behind) in enumerate(parts):
        blanks(before)
        starts_word = i == 0 or before or parts[i - 1][2]
        word = len(core)
        if starts_word:  # as far as the tokens hang together
            for j in range(i + 1, len(parts)):
                if parts[j - 1][2] or parts[j][0]:
                    break
                word += len(parts[j][1])
        if column and column + (word if starts_word and word <= COLUMNS else len(core)) > COLUMNS:
            line, column = line + 1, 0
        spots.append(_Spot(core, line, column))
        column += len(core)
        blanks(behind)
    return spots


def _position(
    trace: Trace,
    words: Callable[[int], str],
    spots: Sequence[_Spot],
    place: int,
    fullest: float,
    animations: dict[Track, str],
) -> str:
    """The box and the texts of one position."""
    spot = spots[place]
    x, y, width = spot.column * CHAR, spot.line * LINE, max(len(spot.text), 1) * CHAR
    masked = trace.masked[:, place]
    opacity: dict[tuple[str, str], np.ndarray] = {}
    for frame in range(len(masked)):
        if not masked[frame]:
            key, ink = (
                ("given" if trace.prompt[place] else "ink", split(words(int(trace.tokens[frame, place])))[1]),
                1.0,
            )
        elif trace.predicted[frame, place] and fullest:
            key = "guess", split(words(int(trace.ids[frame, place, 0])))[1]
            probs = trace.probs[frame, place]
            share = trace.lam[frame, place] / fullest
            ink = round(TINTS * np.sqrt(share) * probs[0] / max(probs.sum(), 1e-30)) / TINTS
        else:
            continue
        opacity.setdefault(key, np.zeros(len(masked)))[frame] = ink
    box = f'<rect x="{x + 0.5:.1f}" y="{y - 16}" width="{width - 1:.1f}" height="21" rx="3"'
    drawn = [_element(box, "mask", masked.astype(float), animations, "/>")] if masked.any() else []
    for (kind, text), values in opacity.items():
        shown = text[: max(len(spot.text), 1)]  # a longer candidate is cut where the final token ends
        head = f'<text x="{x:.1f}" y="{y}" textLength="{len(shown) * CHAR:.1f}" lengthAdjust="spacingAndGlyphs"'
        if values.any() and text.strip("\u2423" if kind != "guess" else ""):  # a written blank is blank
            classes = "ink given" if kind == "given" else kind
            drawn.append(_element(head, classes, values, animations, f">{html.escape(shown)}</text>"))
    return "".join(drawn)


def _element(head: str, classes: str, values: np.ndarray, animations: dict[Track, str], rest: str) -> str:
    """With its last opacity as an attribute, which holds where nothing is animated."""
    changes = np.flatnonzero(np.diff(values, prepend=np.nan) != 0)
    track = tuple((int(frame), float(values[frame])) for frame in changes)
    if len(track) > 1:
        classes += " " + animations.setdefault(track, f"k{len(animations)}")
    still = "" if values[-1] == 1 else f' opacity="{values[-1]:g}"'
    return f'{head} class="{classes}"{still}{rest}'


def _keyframes(track: Track, frames: int) -> str:
    share = 100 * PLAYED / (PLAYED + HELD) / max(frames - 1, 1)
    return "{" + "".join(f"{frame * share:.2f}%{{opacity:{value:g}}}" for frame, value in track) + "}"
