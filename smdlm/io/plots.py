"""Curves of a run, drawn from its metrics."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smdlm import files
from smdlm.evaluate.base import Value

Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points x, y, with half-widths of intervals of y if there are any. group: what has one colour in all panels."""

    x: Sequence[float]
    y: Sequence[float]
    interval: Sequence[float] | None = None
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Panel:
    """Curves by their labels. lines: False draws points alone. markers: of the curves of one group in turn, ''
    for none. logarithmic: the x axis."""

    xlabel: str
    ylabel: str
    curves: Mapping[str, Curve]
    lines: bool = True
    markers: str = "osv^D*"
    logarithmic: bool = False


def draw_loss(rows: Rows, values: Mapping[str, Value], path: Path) -> None:
    """Train loss (raw, and the mean of the 5% of points around each) beside the evaluations in their first unit."""
    unit = next((value.unit for value in values.values()), "")
    curves = {v.label: _points(rows, f"val/{name}") for name, v in values.items() if v.unit == unit}
    curves = {label: points for label, points in curves.items() if len(points[0])}
    figure, axes = _figure(1 + bool(curves))
    steps, loss = _points(rows, "train/loss")
    if len(steps):
        axes[0].plot(steps, loss, color="tab:blue", alpha=0.3, linewidth=0.8, label="raw")
        axes[0].plot(steps, _smooth(loss), color="tab:blue", label="smoothed")
        axes[0].legend()
    axes[0].set(title="train loss", xlabel="step", ylabel="nats/token")
    for label, (x, y) in curves.items():
        axes[1].plot(x, y, marker="o", markersize=3, label=label)
        axes[1].set(title="validation", xlabel="step", ylabel=unit)
        axes[1].legend()
    _save(figure, path)


def draw_omega(rows: Rows, labels: Mapping[str, str], path: Path) -> None:
    """The parameters of the soft mask's gate, by their readable names; nothing for a run that has none."""
    curves = {label: _points(rows, f"train/{name}") for name, label in labels.items()}
    curves = {label: points for label, points in curves.items() if len(points[0])}
    if not curves:
        return
    figure, axes = _figure(len(curves))
    for axis, (label, (x, y)) in zip(axes, curves.items(), strict=True):
        axis.plot(x, y)
        axis.set(title=f"ω {label}", xlabel="step")
    _save(figure, path)


def draw_panels(panels: Sequence[Panel], path: Path) -> None:
    """Panels side by side, with one legend below; values that differ by more than five times on a logarithmic axis."""
    groups = list(dict.fromkeys(curve.group or label for panel in panels for label, curve in panel.curves.items()))
    labels = dict.fromkeys(label for panel in panels for label in panel.curves)
    figure, axes = _figure(len(panels), height=3.4 + 0.2 * math.ceil(len(labels) / 4))
    handles = {}
    for axis, panel in zip(axes, panels, strict=True):
        drawn = dict.fromkeys(groups, 0)
        for label, curve in panel.curves.items():
            group = curve.group or label
            marker = panel.markers[drawn[group] % len(panel.markers)] if panel.markers else ""
            style = {"color": f"C{groups.index(group)}", "marker": marker, "linestyle": "-" if panel.lines else "none"}
            line = axis.errorbar(curve.x, curve.y, yerr=curve.interval, label=label, capsize=2, markersize=4, **style)
            handles.setdefault(label, line)
            drawn[group] += 1
        axis.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
        if panel.logarithmic and panel.curves:
            axis.set_xscale("log", base=2)
        values = [y for curve in panel.curves.values() for y in curve.y]
        if values and min(values) > 0 and max(values) > 5 * min(values):
            axis.set_yscale("log")
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize="small")
    _save(figure, path)


def _points(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one metric."""
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    x, y = zip(*points, strict=True) if points else ((), ())
    return np.array(x), np.array(y)


def _smooth(y: np.ndarray) -> np.ndarray:
    """Centred mean over 5% of the points, over fewer at the ends; same length as y."""
    window = np.ones(2 * (len(y) // 40) + 1)
    middle = slice(len(window) // 2, len(window) // 2 + len(y))
    return np.convolve(y, window)[middle] / np.convolve(np.ones(len(y)), window)[middle]


def _figure(panels: int, height: float = 3.4) -> tuple[Any, Sequence[Any]]:
    """A figure with panels side by side; without pyplot, so no display and no global state is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * panels + 1, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    files.write(path, content.getvalue())
