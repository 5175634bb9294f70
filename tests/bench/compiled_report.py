"""What the compilers said, as JSON and as tables in Markdown."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import targets

Results = dict[str, Any]  # target -> {"versions": ..., "figures": {case: {library: figures}}}
Figures = dict[str, Any]
# What a table of layers shows of each library.
CELLS: dict[str, Callable[[Figures], str]] = {
    "Passes: reads and writes of arrays of the input's size": lambda f: str(f["passes"]),
    "Kernels, and how many of them are tiny": lambda f: f"{f['kernels']} ({f['tiny']})",
    "Bytes moved, MB": lambda f: f"{f['quiet_bytes'] / 1e6:.1f}",
    "Temporary memory, MiB": lambda f: f"{f['temp_bytes'] / 2**20:.1f}",
    "Thousand cycles, as the compiler estimates": lambda f: f"{f['cycles'] / 1e3:.0f}",
}
# The columns of the table of training steps.
COLUMNS: dict[str, Callable[[Figures], str]] = {
    "GB moved": lambda f: f"{f['quiet_bytes'] / 1e9:.2f}",
    "passes": lambda f: str(f["passes"]),
    "kernels (tiny)": lambda f: f"{f['kernels']} ({f['tiny']})",
    "temporary MiB": lambda f: f"{f['temp_bytes'] / 2**20:.0f}",
    "million cycles": lambda f: f"{f['cycles'] / 1e6:.2f}",
    "sums with a convolution, alone": lambda f: f"{f['epilogues']}, {f['sums_alone']}",
    "branches": lambda f: str(f["conditionals"]),
    "compile, processor s": lambda f: f"{f['compile_seconds']:.1f}",
}
ONLY_TPU = {
    "Thousand cycles, as the compiler estimates",
    "million cycles",
    "sums with a convolution, alone",
}
ABOUT = """\
# Compiled, not run

Training steps as XLA compiled them for each target, on a machine without it: `make compiled`.
A *pass* reads or writes an array of the input's size (in networks: of a feature map's); a kernel
without one is *tiny*. Branches that a step takes only if it must count nothing. Where a
convolution is a call into a library (H100) its bytes are not counted. On the H100 kernels were
not tuned. *bnjax* is the layer as it comes; the others set `pivot`, or the policy
`convs_and_dots_saveable`."""


def load(folder: Path) -> Results:
    path = folder / "compiled.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save(results: Results, folder: Path) -> None:
    (folder / "compiled.json").write_text(json.dumps(results, indent=1))
    (folder / "compiled.md").write_text(text(results) + "\n")


def text(results: Results) -> str:
    parts = [ABOUT]
    for target, of_target in results.items():
        versions = ", ".join(f"{k} {v}" for k, v in of_target["versions"].items())
        parts.append(f"## {targets.NAMES[target]}\n\n{versions}")
        layers, steps = (
            {n: f for n, f in of_target["figures"].items() if n.startswith(kind)}
            for kind in ("layer", "step")
        )
        parts += _layer_tables(layers, target)
        parts += [_step_table(steps, target)] if steps else []
        parts += _failures(of_target["figures"])
    return "\n\n".join(parts)


def _layer_tables(layers: dict[str, dict[str, Figures]], target: str) -> Iterator[str]:
    """A table for each figure: a row for each input, a column for each library."""
    libraries = list(dict.fromkeys(library for row in layers.values() for library in row))
    for title, cell in CELLS.items() if layers else ():
        if target != "tpu" and title in ONLY_TPU:
            continue
        rows = [["one layer, forward and backward", *libraries]]
        for name, row in layers.items():
            _, _, dtype, _, shape = name.split()
            rows.append([f"{dtype} {shape}", *(_shown(row.get(n), cell) for n in libraries)])
        yield f"{title}:\n\n{_markdown(rows)}"


def _step_table(steps: dict[str, dict[str, Figures]], target: str) -> str:
    columns = {k: cell for k, cell in COLUMNS.items() if target == "tpu" or k not in ONLY_TPU}
    rows = [["training step", "", *columns]]
    for name, row in steps.items():
        for library, figures in row.items():
            cells = [_shown(figures, cell) for cell in columns.values()]
            rows.append([name.removeprefix("step "), library, *cells])
    return _markdown(rows)


def _failures(figures: dict[str, dict[str, Figures]]) -> list[str]:
    return [
        f"{name}: {library} failed: {answer['error']}"
        for name, row in figures.items()
        for library, answer in row.items()
        if "error" in answer
    ]


def _shown(figures: Figures | None, cell: Callable[[Figures], str]) -> str:
    return "-" if figures is None or "error" in figures else cell(figures)


def _markdown(rows: list[list[str]]) -> str:
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])
