"""What `gpu.py` writes: the figures of a case, and a table of all."""

from __future__ import annotations

import statistics
from typing import Any

CURVES = {"curve bf16": "bf16", "curve fp32 on CPU": "fp32"}  # cases that show the losses, and their precision


def summary(found: dict[str, Any], peak_tflops: float) -> dict[str, Any]:
    """Medians over the windows after the first, in which kernels are chosen and the language vectors computed."""
    windows = found["windows"][1:]
    if not windows:
        return {"reason": f"only {len(found['windows'])} windows of steps were done in time"}
    flops = [each["flops"] / each["seconds"] for each in windows]
    return {
        "steps": sum(each["steps"] for each in windows),
        "seconds_a_step": statistics.median(each["seconds"] / each["steps"] for each in windows),
        "tokens_per_second": statistics.median(each["tokens"] / each["seconds"] for each in windows),
        "mfu": statistics.median(flops) / (peak_tflops * 1e12 * found["ranks"]),
        "waited_share": sum(each["waited"] for each in windows) / sum(each["seconds"] for each in windows),
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: hardware, versions and command; a row for each case; the curves."""
    on = results["machine"]
    lines = [
        f"`{results['command']}`: {on['gpu'] or 'no GPU'}, {on['ranks']} rank(s), {on['cpu']}, "
        + ", ".join(f"{name} {version}" for name, version in on["versions"].items())
        + f"; peak taken as {results['peak_tflops']:g} TFLOP/s.",
        "",
        "| case | steps | s/step | tokens/s | MFU | peak GiB | estimate, GiB | loss: first, last |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results["cases"].items():
        values = found.get("summary", {})
        if "tokens_per_second" not in values:
            lines.append(f"| {name} | not measured: {found.get('reason') or values['reason']} | | | | | | |")
            continue
        memory, losses = found["memory"], [each["loss"] for each in found["windows"]]
        used = memory.get("device", memory.get("process", 0))
        lines.append(
            f"| {name} | {values['steps']} | {values['seconds_a_step']:.3f} | {values['tokens_per_second']:,.0f} | "
            f"{values['mfu']:.1%} | {used / 2**30:.2f} | {memory['estimate'] / 2**30:.2f} | "
            f"{losses[0]:.3f}, {losses[-1]:.3f} |"
        )
    lines += ["", curve_line(results["cases"])]
    return "\n".join(lines) + "\n"


def curve_line(cases: dict[str, Any]) -> str:
    """The largest relative difference between the two loss curves."""
    here, there = ([each["loss"] for each in cases.get(name, {}).get("windows", ())] for name in CURVES)
    if not (shared := list(zip(here, there, strict=False))):
        return "Loss curve against fp32 on CPU: not measured."
    largest = max(abs(a - b) / abs(b) for a, b in shared)
    return (
        f"Loss curve of {len(shared)} steps against fp32 on CPU: from {there[0]:.3f} to {there[len(shared) - 1]:.3f}, "
        f"largest relative difference {largest:.2%}."
    )
