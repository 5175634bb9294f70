"""The results as JSON, as one table in parts, and as a picture."""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Results = dict[str, Any]
Case = dict[str, Any]
MEGA = 1e6


def save(results: Results, folder: Path) -> None:
    (folder / "bench.json").write_text(json.dumps(results, indent=1))


def show(results: Results, folder: Path) -> None:
    """Prints the table, and writes it beside the JSON."""
    text = table(results)
    (folder / "bench.txt").write_text(text + "\n")
    print(text)


def seconds(case: Case, library: str) -> list[float]:
    """The times of a library, a round each; none where it failed or took no part."""
    return case["libraries"].get(library, {}).get("seconds", [])


def figure(case: Case, library: str, name: str) -> float:
    """A figure of a library's program, nan where there is none."""
    answer = case["libraries"].get(library, {})
    if name == "compile_seconds":
        return _median(answer.get(name, []))
    return answer.get("figures", {}).get(name, math.nan)


def paired(case: Case, library: str, reference: str) -> tuple[float, float, float] | None:
    """Lower quartile, median and upper quartile of the ratios of times in the same round."""
    pairs = list(zip(seconds(case, library), seconds(case, reference), strict=False))
    if len(pairs) < 2:
        return None
    ratios = [a / b for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def table(results: Results) -> str:
    about = [f"{k} {v}" for k, v in (results["machine"] | results["versions"]).items()]
    parts = [", ".join(about)]
    milliseconds = statistics.median(results["import_milliseconds"])
    parts.append(f"import bnjax, after import jax: {milliseconds:.0f} ms")
    layers = [case for case in results["cases"] if case["kind"] == "layer"]
    groups = [list(g) for _, g in itertools.groupby(layers, key=group)]
    parts += [_time_table(group) for group in groups]
    parts += [_memory_table(g) for g in groups if g[0]["mode"] == "forward_backward"]
    others = [case for case in results["cases"] if case["kind"] != "layer"]
    parts += [_flax_table(others)] if others else []
    failures = [
        f"{case['name']}: {library} failed: {answer['error']}"
        for case in results["cases"]
        for library, answer in case["libraries"].items()
        if "error" in answer
    ]
    return "\n\n".join(parts + ["\n".join(failures)] * bool(failures))


def group(case: Case) -> str:
    """What the cases of one part of the table have in common: all but the shape."""
    return case["name"].rsplit(" ", 1)[0]


def _libraries(cases: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(library for case in cases for library in case["libraries"]))


def _time_table(cases: Sequence[Case]) -> str:
    """A row for each shape; in the columns of the others, their time / bnjax's time."""
    others = [n for n in _libraries(cases) if n != "bnjax"]
    rounds = min(len(seconds(case, "bnjax")) for case in cases)
    title = (
        f"{group(cases[0])}: bnjax in milliseconds; the others' time / bnjax's time,\n"
        f"median of {rounds} rounds or more ± half the interquartile range"
    )
    rows = [["", "bnjax", *others]]
    medians: dict[str, list[float]] = {n: [] for n in others}
    for case in cases:
        row = [case["name"].rsplit(" ", 1)[1], _milliseconds(case, "bnjax")]
        for library in others:
            ratio = paired(case, library, "bnjax")
            if ratio is not None:
                medians[library].append(ratio[1])
            row.append(_spread(ratio))
        rows.append(row)
    means = [f"{statistics.geometric_mean(m):.2f}     " if m else "-" for m in medians.values()]
    rows.append(["geometric mean", "", *means])
    return f"{title}\n{_aligned(rows)}"


def _memory_table(cases: Sequence[Case]) -> str:
    """A row for each library; the medians over the shapes."""
    title = (
        f"{group(cases[0])}: bytes kept for the backward pass, temporary memory and bytes\n"
        "accessed as multiples of the input; trace + compile in milliseconds; medians of the shapes"
    )
    rows = [["", "kept", "temporary", "accessed", "compile"]]
    for library in _libraries(cases):
        row = [library]
        for name in ("residual_bytes", "temp_bytes", "bytes_accessed"):
            ratios = [figure(c, library, name) / figure(c, "bnjax", "input_bytes") for c in cases]
            row.append(_number(_median(ratios), 2))
        compile_time = _median([figure(c, library, "compile_seconds") for c in cases])
        rows.append([*row, _number(1e3 * compile_time, 0)])
    return f"{title}\n{_aligned(rows)}"


def _flax_table(cases: Sequence[Case]) -> str:
    """Training steps and calls outside jit, as multiples of flax's."""
    title = (
        "Training steps, and a layer called outside jit: time, temporary memory (MB), bytes\n"
        "accessed and trace + compile time, and what that is as a multiple of flax's"
    )
    rows = [["", "", "ms", "x flax", "MB", "x flax", "accessed", "compile s", "x flax"]]
    for case in cases:
        for i, library in enumerate(case["libraries"]):
            reference = "flax-nnx" if library.endswith("nnx") else "flax"
            own = {name: figure(case, library, name) for name in _FIGURES}
            ratio = {n: own[n] / (figure(case, reference, n) or math.nan) for n in _FIGURES}
            rows.append(
                [
                    case["name"] if i == 0 else "",
                    library,
                    _milliseconds(case, library),
                    _spread(paired(case, library, reference)),
                    _number(own["temp_bytes"] / MEGA, 1),
                    _number(ratio["temp_bytes"], 2),
                    _number(ratio["bytes_accessed"], 2),
                    _number(own["compile_seconds"], 1),
                    _number(ratio["compile_seconds"], 2),
                ]
            )
    return f"{title}\n{_aligned(rows)}"


def _median(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return statistics.median(known) if known else math.nan


_FIGURES = ("temp_bytes", "bytes_accessed", "compile_seconds")


def _milliseconds(case: Case, library: str) -> str:
    times = seconds(case, library)
    return f"{1e3 * statistics.median(times):.2f}" if times else "-"


def _spread(ratio: tuple[float, float, float] | None) -> str:
    return "-" if ratio is None else f"{ratio[1]:.2f}±{(ratio[2] - ratio[0]) / 2:.2f}"


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; numbers to the right, names to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    names = 1 if rows[0][1] else 2
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
