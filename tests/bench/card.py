"""Times the layer and ResNet-50 on a card: `python tests/bench/card.py`, in eight minutes.

It wants JAX for the card, flax and optax; PyTorch takes part where it can be imported. Rows come
as they are measured, and go to a file with the card's name. The rate of a layer counts the eight
passes over memory that it needs at least, and is compared with that of a copy.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import turns
from cases import Case

LIBRARIES = ["bnjax", "bnjax-batch", "bnjax-running", "flax", "torch"]
PASSES = 8  # forward x, x and y, backward x and dy, x, dy and dx
SIZES = {"float32": 4, "bfloat16": 2}
HEADER = "| | | ms | x flax's time | GB/s | of a copy's |\n|---|---|---|---|---|---|"


def main() -> None:
    options = read_options()
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.budget
    with (options.out / "card.md").open("w") as file:

        def say(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        facts = itself()
        workers = turns.start(LIBRARIES, options.out)
        try:
            say(about(facts, workers))
            todo = cases.card_cases(options.quick, on_cpu=facts["device"] == "cpu")
            for i, case in enumerate(todo):
                left = end - time.monotonic()
                if left < 0:
                    say(f"\nNo time was left for {', '.join(map(cases.name, todo[i:]))}.")
                    break
                measured = turns.measure(case, workers, options.rounds, left / (len(todo) - i))
                for row in rows(measured, facts["copy_bytes_per_second"]):
                    say(row)
        finally:
            for worker in workers.values():
                worker.close()


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer layers: two minutes")
    parser.add_argument(
        "--budget", type=float, help="seconds after which nothing new begins (360; quick: 60)"
    )
    parser.add_argument("--out", type=Path, default=Path("results/card"), help="a folder")
    options = parser.parse_args()
    options.budget = options.budget or (60 if options.quick else 360)
    options.rounds = 5 if options.quick else 11
    return options


def itself() -> dict[str, Any]:
    """What the card does without a layer, found in a process that gives its memory back."""
    command = [sys.executable, str(Path(__file__).with_name("card_itself.py"))]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def about(facts: dict[str, Any], workers: dict[str, Any]) -> str:
    introductions = [worker.introduction["versions"] for worker in workers.values()]
    versions = {name: version for one in introductions for name, version in one.items()}
    branches = " and ".join(
        f"{1e6 * one['seconds']:.1f} us between passes over {one['bytes'] / 1e6:.2g} MB"
        for one in facts["conditionals"]
    )
    return "\n".join(
        [
            f"# Timed on {facts['device']}\n",
            ", ".join(f"{name} {version}" for name, version in versions.items()),
            f"\nA copy moves {facts['copy_bytes_per_second'] / 1e9:.0f} GB/s. A branch that is not "
            f"taken costs {branches}.\n",
            HEADER,
        ]
    )


def rows(measured: Case, copy_speed: float) -> Iterator[str]:
    """A row for each library."""
    medians = {
        library: statistics.median(answer["seconds"])
        for library, answer in measured["libraries"].items()
        if answer["seconds"]
    }
    flax = medians.get("flax", math.nan)
    for library, answer in measured["libraries"].items():
        if library not in medians:
            yield f"| {measured['name']} | {library} | {answer['error']} | | | |"
            continue
        seconds = medians[library]
        cells = [measured["name"], library, f"{1e3 * seconds:.3f}", f"{seconds / flax:.2f}"]
        if measured["kind"] == "layer":
            size = math.prod(measured["shape"]) * SIZES[measured["dtype"]]
            speed = PASSES * size / seconds
            cells += [f"{speed / 1e9:.0f}", f"{speed / copy_speed:.2f}"]
        yield f"| {' | '.join(cells + [''] * (6 - len(cells)))} |"


if __name__ == "__main__":
    main()
