"""Plots of a `ProbeReport`: measures by layer with the chosen area, and sentences before and after the shift.

Colours are those of Okabe and Ito, which colour-blind people can distinguish; languages also differ in pattern.

Shapes: S sentences, H hidden.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from data_pipeline.plot_text import PlotText
from evals.probe import ProbeReport
from evals.representation_plots import COLOURS, PATTERNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

YELLOW = "#F0E442"  # of the same palette; as a thin line it is hard to see, so it comes last
MARKERS = "osD^vP*X"
PANELS = {
    "sum": ("Distance between subspaces", "covariances (a dimension) + means (relative)"),
    "retrieval": ("Retrieval of translations", "share found, standardised states"),
    "riemannian": ("Covariances alone", "Riemannian distance / sqrt(width)"),
    "mean_distance": ("Means alone", "standard deviations"),
}
Z = 1.96  # of a 95 % interval


def styles(languages: list[str]) -> dict[str, dict[str, Any]]:
    """Colour and pattern of each language."""
    pairs = itertools.cycle((colour, pattern) for pattern in PATTERNS for colour in (*COLOURS, YELLOW))
    return {language: {"color": c, "linestyle": p} for language, (c, p) in zip(languages, pairs, strict=False)}


def _name(report: ProbeReport) -> str:
    return report.model.rstrip("/").rpartition("/")[2]


def draw_curves(report: ProbeReport) -> Figure:
    """Four measures by layer: a line for each language, the mean in black with its 95 % interval, the area shaded."""
    text = PlotText.of([report.vectors.dominant, *report.measures, report.model])
    with text.fonts():
        return _curves(report, text)


def _curves(report: ProbeReport, text: PlotText) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from modeling.shifcon.layer_area import mean_curves
    from modeling.shifcon.layer_probe import jackknife_error

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    toward, back = report.choice.area
    drawn = styles(list(report.measures))
    for axes, (name, (title, unit)) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        mean_RN = mean_curves(report.measures, name)
        if not mean_RN[0].isfinite().any():
            axes.text(0.5, 0.5, "no translations among the sentences", transform=axes.transAxes, ha="center")
            axes.set_axis_off()
            continue
        axes.axvspan(toward - 0.5, back - 0.5, color="#E69F00", alpha=0.18, linewidth=0, label="layer area")
        for language, measures in report.measures.items():
            axes.plot(measures.values[name][0], linewidth=1.1, alpha=0.85, label=text(language), **drawn[language])
        mean, reach = mean_RN[0], Z * jackknife_error(mean_RN[1:])
        layers = range(len(mean))
        axes.fill_between(layers, mean - reach, mean + reach, color="black", alpha=0.15, linewidth=0)
        axes.plot(layers, mean, color="black", linewidth=2.6, label="mean, 95 % interval", zorder=4)
        axes.set(title=title, xlabel="layer entered (0: embeddings)", ylabel=unit)
        # An outlier at the embeddings, which are in no area, would flatten the other layers.
        highest = max(float(measures.values[name][0, 1:].nan_to_num(0).max()) for measures in report.measures.values())
        axes.set_ylim(0, 1.05 * highest)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.02)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False)
    figure.suptitle(
        f"{text(_name(report))}: languages against {text(report.vectors.dominant)}; area [{toward}, {back}) by "
        f"{report.choice.rule}"
    )
    return figure


def draw_scatter(report: ProbeReport) -> Figure:
    """Sentences in the two directions that tell languages apart best, at three layers; above unshifted, below shifted.

    The directions are those of a linear discriminant analysis of the unshifted states at the layer.
    """
    text = PlotText.of([*report.vectors.languages, report.model])
    with text.fonts():
        return _sentences(report, text)


def _sentences(report: ProbeReport, text: PlotText) -> Figure:
    from matplotlib.figure import Figure

    toward, back = report.choice.area
    layers = (toward, (toward + back) // 2, back)
    titles = (
        f"entering layer {layers[0]}: shifted",
        f"entering layer {layers[1]}: inside",
        f"entering layer {back}: shifted back",
    )
    scatter, figure = report.scatter, Figure(figsize=(11, 7.5), layout="constrained")
    drawn = styles(list(report.vectors.languages))
    grid = figure.subplots(2, 3)
    for column, (layer, title) in enumerate(zip(layers, titles, strict=True)):
        plain = scatter.plain[:, layer].double()
        directions = discriminant_directions(plain, scatter.languages)
        points = [
            (side[:, layer].double() - plain.mean(dim=0)) @ directions for side in (scatter.plain, scatter.shifted)
        ]
        for row, (found, when) in enumerate(zip(points, ("without shift", "with shift"), strict=True)):
            axes: Axes = grid[row][column]
            for number, language in enumerate(report.vectors.languages):
                own = [place for place, each in enumerate(scatter.languages) if each == language]
                axes.scatter(
                    found[own, 0], found[own, 1], s=16, alpha=0.75, linewidths=0, color=drawn[language]["color"],
                    marker=MARKERS[number % len(MARKERS)], label=text(language),
                )  # fmt: skip
            axes.set_title(f"{when}, {title}" if row else f"{when}, {title.partition(':')[0]}", fontsize="medium")
            axes.set(xticks=[], yticks=[])
        low = min(float(each.min()) for each in points)
        high = max(float(each.max()) for each in points)
        low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
        for row in range(2):
            grid[row][column].set(xlim=(low, high), ylim=(low, high))
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 12), frameon=False)
    figure.suptitle(f"{text(_name(report))}: sentences in the two directions that tell languages apart best (LDA)")
    return figure


def discriminant_directions(states_SH: Tensor, languages: list[str]) -> Tensor:
    """(H, 2): the directions in which languages lie apart most, relative to the variation within them (Fisher 1936).

    The covariance within languages is shrunk towards its diagonal's mean by 10 %, since there are few sentences.
    """
    import numpy as np
    import scipy.linalg
    import torch

    names = sorted(set(languages))
    centred, means = states_SH.clone(), []
    for name in names:
        own = [place for place, each in enumerate(languages) if each == name]
        means.append(states_SH[own].mean(dim=0))
        centred[own] -= means[-1]
    within = (centred.T @ centred / len(states_SH)).numpy()
    within = 0.9 * within + 0.1 * np.trace(within) / len(within) * np.eye(len(within))
    between = torch.cov(torch.stack(means).T).numpy()
    last = len(within) - 1
    found = scipy.linalg.eigh(between, within, subset_by_index=[last - 1, last])[1]
    return torch.from_numpy(found[:, ::-1].copy())
