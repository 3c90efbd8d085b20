"""Plots of a run's record: loss per language, contrastive loss, restoration error; PNG files, uploaded to MLflow."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.plot_text import PlotText
from training.tracking.run_record import RECORD_NAME, read_events

MAX_CURVES, EXTREMES = 24, 4  # more than can be told apart; of these, lowest and highest ones that are named
# file name: (title, y axis, metric names or prefixes that end in "/")
PLOTS = {
    "train_loss": ("Training loss", "nats per label token", ("train/loss/",)),
    "eval_loss": ("Held-out loss", "nats per label token", ("eval/loss/",)),
    "swapped_prompts": ("Held-out loss behind another item's prompt", "nats per label token", ("eval/loss_swapped/",)),
    "contrastive": ("Contrastive loss", "nats per pair", ("train/contrastive",)),
    "restoration_error": ("Restoration error of the shift back", "share of the shift", ("shift/restoration_error/",)),
    "shift_norm": ("Length of the shift", "share of the states' length", ("shift/norm/",)),
}


def draw_plots(output_dir: Path) -> list[Path]:
    """Draw every plot for which the record has metrics, below `<output_dir>/plots`; the files."""
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for _, event in read_events(output_dir / RECORD_NAME):
        if event["kind"] == "metrics":
            for name, value in event["values"].items():
                curves[name][event["step"]] = float(value)  # a step repeated after a resume replaces the lost one
    folder = output_dir / "plots"
    folder.mkdir(exist_ok=True)
    files = []
    for name, (title, axis, wanted) in PLOTS.items():
        chosen = sorted(metric for metric in curves if metric.startswith(wanted))
        if not chosen:
            continue
        files.append(folder / f"{name}.png")
        _draw({metric.rsplit("/", 1)[-1]: curves[metric] for metric in chosen}, title, axis, files[-1])
    return files


def _draw(curves: Mapping[str, Mapping[int, float]], title: str, axis: str, file: Path) -> None:
    """Draw one plot. `curves`: by name, such as a language; each maps steps to values.

    Of many curves, those that end lowest and highest are drawn, over the median and the middle 80 % of all.
    """
    from matplotlib.figure import Figure

    shown = _extremes(curves) if len(curves) > MAX_CURVES else list(curves)
    text = PlotText.of(shown)
    with text.fonts():
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        if len(shown) < len(curves):
            steps, low, middle, high = _spread(curves)
            axes.fill_between(steps, low, high, color="lightgrey", label=f"middle 80 % of {len(curves)}")
            axes.plot(steps, middle, color="black", label="median", linewidth=1.6)
        for name in shown:
            points = sorted(curves[name].items())
            mark = "." if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), label=text(name), linewidth=1.2, marker=mark)
        # A cross at the lower edge for each step with a NaN or infinite value, where its curve has a gap.
        gaps = sorted({step for curve in curves.values() for step, value in curve.items() if not math.isfinite(value)})
        if gaps:
            edge = axes.get_xaxis_transform()
            axes.plot(gaps, [0.02] * len(gaps), "x", color="black", transform=edge, label="not finite", clip_on=False)
        axes.set(title=title, xlabel="step", ylabel=axis)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(ncols=2, fontsize="small")
        figure.savefig(file, dpi=120)


def _extremes(curves: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Names of the curves with the lowest and the highest last values."""
    last = {name: curve[max(curve)] for name, curve in curves.items()}
    finite = sorted((name for name in last if math.isfinite(last[name])), key=last.__getitem__)
    return [*finite[:EXTREMES], *finite[-EXTREMES:]] if len(finite) >= 2 * EXTREMES else finite


def _spread(curves: Mapping[str, Mapping[int, float]]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps, and the 10th, 50th and 90th percentile of the finite values of each."""
    by_step: dict[int, list[float]] = defaultdict(list)
    for curve in curves.values():
        for step, value in curve.items():
            if math.isfinite(value):
                by_step[step].append(value)
    steps = sorted(by_step)
    low, middle, high = (
        [sorted(by_step[step])[round(share * (len(by_step[step]) - 1))] for step in steps] for share in (0.1, 0.5, 0.9)
    )
    return steps, low, middle, high
