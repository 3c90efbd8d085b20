"""Plots of a `RepresentationReport`: CKA and centroid distance by layer, one colour a model.

Bold: the mean over languages. Thin: each language; the last model's are labelled at the right edge, at the height of
their last value. Colours are those of Okabe and Ito, which colour-blind people can distinguish; models also differ
in the line's pattern.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.atomic import atomic_file, write_text
from data_pipeline.plot_text import PlotText
from evals.representations import ModelRepresentations, RepresentationReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

JSON_FILE = "representations.json"
PLOT_FILE = "representations.png"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PATTERNS = ("-", "--", "-.", ":")
NAME_HEIGHT = 0.033  # height of a language's name, as a share of the panel's


def write_report(report: RepresentationReport, output: Path, debiased: bool = False) -> tuple[Path, Path]:
    """Write the report as `representations.json` and `representations.png`; each file is complete or absent."""
    data, plot = output / JSON_FILE, output / PLOT_FILE
    write_text(data, json.dumps(report.to_json(), ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    with atomic_file(plot) as temporary:
        draw(report, debiased).savefig(temporary, dpi=150, format="png")
    return data, plot


def draw(report: RepresentationReport, debiased: bool = False) -> Figure:
    """Two panels: CKA (`debiased`: the debiased one) and centroid distance, both by layer."""
    text = PlotText.of([report.dominant, *report.sentences, *report.models])
    with text.fonts():
        return _figure(report, debiased, text)


def _figure(report: RepresentationReport, debiased: bool, text: PlotText) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = {
        "cka_debiased" if debiased else "cka": ("Linear CKA" + ", debiased" * debiased, "1: alike, 0: unrelated"),
        "centroid_distance": ("Distance between centroids", "share of the states' mean length"),
    }
    for axes, (measure, (title, unit)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for number, (label, model) in enumerate(report.models.items()):
            _draw_model(axes, model, measure, text(label), number)
        axes.set(title=title, xlabel="layer (0: embeddings)", ylabel=unit)
        axes.set_ylim(*_range(report, measure))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.02)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        _name_languages(axes, report, measure, text)
    languages = len(report.sentences)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"Translations against {text(report.dominant)}, pooling {report.pooling}: mean over {languages} "
        f"language{'s' * (languages != 1)} (bold) and each (thin)",
        fontsize="medium",
    )
    if report.few and not debiased:
        note = f"too high for {len(report.few)} of {languages}: fewer sentences than the states are wide (see debiased)"
        figure.axes[0].annotate(note, (0.02, 0.02), xycoords="axes fraction", fontsize=7, color="0.35")
    return figure


def _draw_model(axes: Axes, model: ModelRepresentations, measure: str, label: str, number: int) -> None:
    style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linestyle": PATTERNS[number % len(PATTERNS)]}
    layers = range(model.layers + 1)
    for curve in model.curves[measure].values():
        axes.plot(layers, [_gap(value) for value in curve], linewidth=0.7, alpha=0.4, **style)
    mean = [_gap(value) for value in model.mean(measure)]
    axes.plot(layers, mean, linewidth=2.8, label=label, marker="o", markersize=3.5, zorder=3, **style)


def _gap(value: float | None) -> float:
    return float("nan") if value is None else value


def _range(report: RepresentationReport, measure: str) -> tuple[float, float]:
    """From 0 upwards; a debiased CKA may be negative."""
    values = [
        value
        for model in report.models.values()
        for curve in model.curves[measure].values()
        for value in curve
        if value is not None
    ]
    if measure != "centroid_distance":
        return min([0.0, *values]) * 1.05, 1.02
    return 0.0, 1.05 * max(values, default=1.0) or 1.0


def _name_languages(axes: Axes, report: RepresentationReport, measure: str, text: PlotText) -> None:
    """Write the names of the last model's curves right of the panel, moved apart where they would overlap."""
    number, model = len(report.models) - 1, list(report.models.values())[-1]
    low, high = axes.get_ylim()
    ends = {language: curve[-1] for language, curve in model.curves[measure].items()}
    heights = {language: (end - low) / (high - low) for language, end in ends.items() if end is not None}
    for language, height in _apart(heights, NAME_HEIGHT).items():
        axes.annotate(
            text(language), (1.0, heights[language]), (1.04, height), xycoords="axes fraction",
            textcoords="axes fraction", fontsize=7, va="center", color=COLOURS[number % len(COLOURS)],
            arrowprops={
                "arrowstyle": "-", "color": "0.75", "linewidth": 0.5, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _apart(heights: dict[str, float], gap: float) -> dict[str, float]:
    """The heights, in order, at least `gap` apart and within 0..1 if there is room, moved as little as possible."""
    gap = min(gap, 1 / max(1, len(heights) - 1))
    names = sorted(heights, key=lambda name: heights[name])
    up = _pushed([heights[name] for name in names], gap, -math.inf)
    down = [-height for height in _pushed([-heights[name] for name in reversed(names)], gap, -math.inf)]
    between = [(one + other) / 2 for one, other in zip(up, reversed(down), strict=True)]  # as far apart as each is
    lifted = _pushed(between, gap, 0.0)
    lowered = [-height for height in _pushed([-height for height in reversed(lifted)], gap, -1.0)]
    return dict(zip(names, reversed(lowered), strict=True))


def _pushed(ascending: list[float], gap: float, lowest: float) -> list[float]:
    """Each at least `gap` above the previous one, the first at least `lowest`."""
    placed = []
    for height in ascending:
        placed.append(max(height, lowest))
        lowest = placed[-1] + gap
    return placed
