"""One library's process: answers jobs, a line of JSON each, and sleeps in between.

`python worker.py LIBRARY`. The first line it writes says which device and versions it has, or
what is missing. After that it answers {"do": "prepare", "case": ...} with the figures that need
no run, and {"do": "time", "repeats": n} with the seconds of one call. Where a job fails the
answer is the error, and the traceback goes to stderr.
"""

import gc
import importlib
import importlib.metadata
import json
import os
import sys
import traceback
from typing import Any

from work import Case, Work, seconds_per_call

# What to import and to name the version of.
PACKAGES = {
    "bnjax": ("bnjax", "flax", "jax", "jaxlib"),
    "bnjax-batch": ("bnjax", "flax", "jax", "jaxlib"),
    "bnjax-running": ("bnjax", "flax", "jax", "jaxlib"),
    "bnjax-policy": ("bnjax", "flax", "jax", "jaxlib"),
    "bnjax-nnx": ("bnjax", "flax", "jax", "jaxlib"),
    "flax": ("flax", "jax", "jaxlib"),
    "flax-nnx": ("flax", "jax", "jaxlib"),
    "haiku": ("haiku", "jax", "jaxlib"),
    "equinox": ("equinox", "jax", "jaxlib"),
    "keras": ("keras", "jax", "jaxlib"),
    "torch": ("torch",),
    "limit": ("jax", "jaxlib"),
}
DISTRIBUTIONS = {"haiku": "dm-haiku"}


def main() -> None:
    library = sys.argv[1]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes where stderr goes

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        versions = {name: version(name) for name in PACKAGES[library]}
    except ImportError as error:
        return answer({"missing": str(error)})
    on = device(library)
    answer({"device": on, "versions": versions})
    work = None
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if job["do"] == "prepare":
                work = None
                gc.collect()
                work = prepare(library, job["case"])
                answer({"figures": work.figures})
            else:
                answer({"seconds": seconds_per_call(work, job["repeats"], queue=on != "cpu")})
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})


def version(package: str) -> str:
    """Imports the package, which raises ImportError if it is missing."""
    module = importlib.import_module(package)
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(package, package))
    except importlib.metadata.PackageNotFoundError:  # it runs from a checkout
        return module.__version__


def device(library: str) -> str:
    """The name of the accelerator, or cpu."""
    if library == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    import jax

    return "cpu" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind


def prepare(library: str, case: Case) -> Work:
    """The library's work of a case. What it needs is imported here, as others lack it."""
    if library == "torch":
        if case["kind"] == "step":
            from torch_steps import step_work
        else:
            from torch_layers import layer_work as step_work
        return step_work(case)
    if library == "limit":
        from limit import limit_work

        return limit_work(case)
    if case["kind"] == "step":
        from steps import step_work

        return step_work(library, case)
    from layers import eager_work, layer_work

    return (eager_work if case["kind"] == "eager" else layer_work)(library, case)


if __name__ == "__main__":
    main()
