"""Libraries take turns on the same work, a process each, and their times are written down."""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import cases
from cases import Case
from process import Worker, library_worker

TURN_SECONDS = 0.05  # a turn repeats its work until about this time
PAUSE_SECONDS = 0.01  # before a turn: threads of the turn before spin a little, then sleep


def start(libraries: list[str], folder: Path) -> dict[str, Worker]:
    """A worker for each library that is installed."""
    workers = {library: library_worker(library, folder) for library in libraries}
    for library, worker in list(workers.items()):
        worker.introduction = worker.answer()
        if "versions" not in worker.introduction:
            why = worker.introduction.get("missing") or worker.introduction["error"]
            print(f"{library} is left out: {why}", file=sys.stderr)
            workers.pop(library).close()
    if "bnjax" not in workers:
        sys.exit("bnjax must be installed (pip install .) to be measured.")
    return workers


def measure(
    case: Case, part: dict[str, Worker], rounds: int, seconds: float, compilations: int = 1
) -> dict[str, Any]:
    """The figures and times of the libraries that take part in a case.

    Stops early, though not before three rounds, when `seconds` are over.
    """
    end = time.monotonic() + seconds
    answers = prepare(case, part, compilations)
    times: dict[str, list[float]] = {n: [] for n in part if "error" not in answers[n]}
    once = [part[n].ask(do="time", repeats=1).get("seconds", 0) for n in times]
    repeats = max(round(TURN_SECONDS / max(statistics.median(once), 1e-6)), 1) if once else 1
    for i in range(rounds):
        if i >= 3 and time.monotonic() > end:
            break
        for library in list(times):
            time.sleep(PAUSE_SECONDS)
            answer = part[library].ask(do="time", repeats=repeats)
            if "error" in answer:
                answers[library] = answer
                del times[library]
            else:
                times[library].append(answer["seconds"])
    results = {n: answers[n] | {"seconds": times.get(n, [])} for n in part}
    return {"name": cases.name(case), **case, "libraries": results}


def prepare(case: Case, part: dict[str, Worker], rounds: int) -> dict[str, dict[str, Any]]:
    """Compiles in turns, too, and adds the times that it took."""
    took: dict[str, list[float]] = {n: [] for n in part}
    for _ in range(rounds):
        answers = {n: w.ask(do="prepare", case=case) for n, w in part.items()}
        for library, answer in answers.items():
            if "compile_seconds" in answer.get("figures", {}):
                took[library].append(answer["figures"].pop("compile_seconds"))
    return {n: answer | {"compile_seconds": took[n]} for n, answer in answers.items()}
