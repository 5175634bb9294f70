"""Compiles for a CPU, a TPU v5e and an H100, and says what the compilers made of it.

Nothing is run and no device is needed: figures are exact, and free of noise, but they are the
compiler's view. Each target has an environment of its own, which is made here.
"""

import argparse
import itertools
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import cases
import compiled_report
import targets
from process import Worker
from tqdm import tqdm

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LIBRARIES = ("bnjax", "bnjax-batch", "bnjax-running", "bnjax-policy", "flax", "flax-two-pass")


def main() -> int:
    options = read_options()
    if options.check:
        return check(options.check, options.environments)
    options.out.mkdir(parents=True, exist_ok=True)
    todo = choose(options)
    results = compiled_report.load(options.out)
    for target in options.targets:
        python = environment(target, options.environments)
        if python is not None:
            measure(target, python, todo, results, options.out)
    print(compiled_report.text(results))
    return 0


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check",
        choices=("tpu", "h100"),
        nargs="?",
        const="tpu",
        help="no figures: run test_compiled.py for this target (tpu: two minutes)",
    )
    parser.add_argument("--quick", action="store_true", help="without ResNet-50")
    parser.add_argument(
        "--targets", nargs="+", choices=targets.PACKAGES, default=["cpu", "tpu", "h100"]
    )
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="WORD",
        help="only cases with all these words in their names, such as: resnet50 bfloat16",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/compiled"),
        help="a folder; figures there that are not measured again stay",
    )
    parser.add_argument("--environments", type=Path, default=Path(".venv/compiled"))
    return parser.parse_args()


def choose(options: argparse.Namespace) -> list[tuple[str, cases.Case]]:
    """Libraries and cases that the options ask for."""
    every = [c for c in cases.compiled_cases() if not (options.quick and is_large(c))]
    todo = [c for c in every if all(word in cases.name(c).split() for word in options.cases)]
    if not todo:
        names = "\n  ".join(map(cases.name, every))
        sys.exit(f"No case has all of {', '.join(options.cases)} in its name:\n  {names}")
    return [
        (library, case)
        for case, library in itertools.product(todo, options.libraries)
        if case["kind"] == "step" or library != "bnjax-policy"  # there is nothing to recompute
    ]


def is_large(case: cases.Case) -> bool:
    """Whether to compile it takes minutes."""
    return case.get("model") == "resnet50"


def environment(target: str, folder: Path) -> Path | None:
    """The Python that has the target's compiler, or nothing, and a word why."""
    wanted = " ".join(targets.PACKAGES[target])
    home = (folder / target).absolute()
    python, done = home / "bin" / "python", home / "requirements.txt"
    if done.exists() and done.read_text() == wanted:
        return python
    print(f"{target}: installing {wanted}", file=sys.stderr)
    venv.create(home, with_pip=True)
    command = [python, "-m", "pip", "install", "--quiet", *wanted.split()]
    pip = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if pip.returncode:
        why = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
        print(f"{target} is skipped: {why[-1] if why else pip.stderr}", file=sys.stderr)
        return None
    done.write_text(wanted)
    return python


def measure(
    target: str,
    python: Path,
    todo: list[tuple[str, cases.Case]],
    results: dict[str, Any],
    out: Path,
) -> None:
    command = [str(python), str(HERE / "compiled_worker.py"), target]
    worker = Worker(command, out / f"{target}.log", targets.ENVIRONMENT | {"PYTHONPATH": str(ROOT)})
    introduction = worker.answer()
    if "versions" not in introduction:
        print(f"{target} is skipped: {introduction['error']}", file=sys.stderr)
        return worker.close()
    of_target = results.setdefault(target, {"figures": {}})
    of_target["versions"] = introduction["versions"]
    progress = tqdm(todo, unit="program")
    try:
        for library, case in progress:
            progress.set_description(f"{target} {library} {cases.name(case)}")
            answer = worker.ask(library=library, case=case)
            of_target["figures"].setdefault(cases.name(case), {})[library] = answer
            compiled_report.save(results, out)
    finally:
        progress.close()
        worker.close()


def check(target: str, folder: Path) -> int:
    """Runs the tests of what the target's compiler makes."""
    python = environment(target, folder)
    if python is None:
        return 1
    command = [python, "-m", "pytest", HERE / "test_compiled.py"]
    variables = os.environ | targets.ENVIRONMENT | {"PYTHONPATH": str(ROOT), "TARGET": target}
    return subprocess.run(command, cwd=ROOT, env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())
