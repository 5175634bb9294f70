"""Measures bnjax side by side with other libraries: `python tests/bench/run.py --help`.

Each library has a process of its own (worker.py). They take turns on the same work, A B C A B
C ..., so that whatever else the machine does hits all of them alike. A time is compared with
bnjax's in the same round; what is printed is the median over the rounds, with the quartiles.
"""

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cases
import picture
import report
import turns
from cases import Case
from process import Worker
from tqdm import tqdm
from work import cores


def main() -> None:
    options = read_options()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    workers = turns.start(options.libraries, options.out)
    results = describe(workers) | {"cases": []}
    todo = choose(options, on_cpu=workers["bnjax"].introduction["device"] == "cpu")
    progress = tqdm(todo)
    try:
        for i, case in enumerate(progress):
            progress.set_description(cases.name(case))
            left = options.budget - (time.monotonic() - started)
            share = left / (len(todo) - i)
            part = {n: w for n, w in workers.items() if cases.takes_part(n, case)}
            compilations = 1 if options.quick or case["kind"] != "step" else 3
            measured = turns.measure(case, part, options.rounds, share, compilations)
            results["cases"].append(measured)
            report.save(results, options.out)
    except KeyboardInterrupt:
        print("\nInterrupted. This is what there is:", file=sys.stderr)
    finally:
        progress.close()
        for worker in workers.values():
            worker.close()
    report.show(results, options.out)
    picture.draw(results, options.out / "bench.png")
    print(f"\nIn {options.out}: bench.txt, bench.json (every round), bench.png, and the logs")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few cases and rounds: two minutes")
    parser.add_argument(
        "--libraries",
        nargs="+",
        choices=cases.LIBRARIES,
        default=cases.LIBRARIES,
        metavar="NAME",
        help=f"of {', '.join(cases.LIBRARIES)}; bnjax always takes part",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="WORD",
        help="only cases with all these words in their names, such as: forward_backward float32",
    )
    parser.add_argument("--rounds", type=int, help="turns of each library (15; quick: 5)")
    parser.add_argument("--budget", type=float, help="seconds for all (3600; quick: 100)")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="a folder")
    options = parser.parse_args()
    options.rounds = options.rounds or (5 if options.quick else 15)
    options.budget = options.budget or (100 if options.quick else 3600)
    options.libraries = [n for n in cases.LIBRARIES if n in (*options.libraries, "bnjax")]
    return options


def choose(options: argparse.Namespace, on_cpu: bool) -> list[Case]:
    """The cases that the options ask for."""
    every = cases.quick_cases(on_cpu) if options.quick else cases.all_cases(on_cpu)
    todo = [c for c in every if all(word in cases.name(c).split() for word in options.cases)]
    if not todo:
        names = "\n  ".join(map(cases.name, every))
        sys.exit(f"No case has all of {', '.join(options.cases)} in its name:\n  {names}")
    return todo


def describe(workers: dict[str, Worker]) -> dict[str, Any]:
    """The machine, the versions, and the one figure that needs no worker."""
    introductions = [worker.introduction for worker in workers.values()]
    device = introductions[0]["device"]
    return {
        "machine": {
            "device": processor() if device == "cpu" else device,
            "cores": cores(),
            "system": platform.system(),
            "python": platform.python_version(),
        },
        "versions": {k: v for one in introductions for k, v in one["versions"].items()},
        "import_milliseconds": import_milliseconds(),
    }


def import_milliseconds() -> list[float]:
    """What `import bnjax` takes after `import jax`, in new processes."""
    code = (
        "import time, jax; start = time.perf_counter(); import bnjax; "
        "print(1e3 * (time.perf_counter() - start))"
    )
    command = [sys.executable, "-c", code]
    run = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(5)]
    return [float(r.stdout) for r in run]


def processor() -> str:
    """The CPU's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
