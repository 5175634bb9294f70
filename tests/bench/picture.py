"""The picture: the layer's time beside the other libraries', and the memory of training steps."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from report import figure, group, paired

Case = dict[str, Any]
LOOKS = {
    "bnjax-running": ("tab:blue", "o"),
    "flax": ("tab:orange", "s"),
    "haiku": ("tab:green", "^"),
    "equinox": ("tab:purple", "v"),
    "keras": ("tab:red", "D"),
    "torch": ("tab:brown", "P"),
    "limit": ("black", "|"),
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws what there is: the layer's times, the memory of training steps, or both."""
    layers = [case for case in results["cases"] if case["kind"] == "layer"]
    layers = [case for case in layers if group(case) == group(layers[0])]
    steps = [case for case in results["cases"] if case["kind"] == "step"]
    panels = [p for p in ((_draw_times, layers), (_draw_memory, steps)) if p[1]]
    if not panels:
        return
    size = 7.5 * len(panels), max(5, 0.7 * max(len(cases) for _, cases in panels))
    canvas, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, (draw_panel, cases) in zip(axes[0], panels, strict=True):
        draw_panel(axis, cases)
    where = f"{results['machine']['device']}, {results['machine']['cores']} cores"
    canvas.suptitle(f"{where}, JAX {results['versions']['jax']}", fontsize=10)
    canvas.tight_layout()
    canvas.savefig(path, dpi=120)


def _draw_times(axis: Axes, cases: list[Case]) -> None:
    """A row for each shape, a mark for each library with its quartiles."""
    drawn = [name for name in LOOKS if any(name in case["libraries"] for case in cases)]
    for i, library in enumerate(drawn):
        color, marker = LOOKS[library]
        for row, case in enumerate(cases):
            ratio = paired(case, library, "bnjax")
            if ratio is not None:
                low, middle, high = ratio
                y = row + 0.6 * ((i + 0.5) / len(drawn) - 0.5)
                axis.plot([low, high], [y, y], color=color, linewidth=1.5, alpha=0.6)
                axis.plot(middle, y, marker, color=color, markersize=6)
        axis.plot([], [], marker, color=color, label=library)
    axis.axvline(1, color="tab:blue", linewidth=1.5, label="bnjax")
    axis.set_xscale("log")
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16, 32]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(cases)), [case["name"].rsplit(" ", 1)[1] for case in cases])
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("time / bnjax's time (right of the line: slower than bnjax)")
    axis.set_title(group(cases[0]).replace("_", " + "), fontsize=11)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _draw_memory(axis: Axes, cases: list[Case]) -> None:
    """For each step a bar for each layer, relative to flax's."""
    libraries = {"flax": "tab:orange", "bnjax": "tab:blue", "bnjax-policy": "lightskyblue"}
    height = 0.8 / len(libraries)
    for i, (library, color) in enumerate(libraries.items()):
        bars = [figure(c, library, "temp_bytes") / figure(c, "flax", "temp_bytes") for c in cases]
        where = [row + (i - 1) * height for row in range(len(cases))]
        axis.barh(where, bars, height, color=color, label=library)
        for y, bar in zip(where, bars, strict=True):
            if not math.isnan(bar):
                axis.text(bar + 0.01, y, f"{bar:.2f}", va="center", fontsize=8)
    axis.set_yticks(range(len(cases)), [f"{c['model']}\n{c['dtype']}" for c in cases])
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set_xlabel("temporary memory / flax's")
    axis.set_title("training step, compiled", fontsize=11)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
