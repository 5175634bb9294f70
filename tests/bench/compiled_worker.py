"""Compiles for one target: answers jobs, a line of JSON each.

`python compiled_worker.py TARGET`, in an environment that has the target's compiler. The first
line it writes says the versions. After that it answers {"library": ..., "case": ...} with the
figures of the compiled program, and the seconds of processor time to trace and compile it.
"""

import importlib.metadata
import json
import os
import sys
import time
import traceback
from typing import Any

import targets

PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda12-pjrt")


def main() -> None:
    target = sys.argv[1]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a compiler prints goes where stderr goes

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    from jax.sharding import SingleDeviceSharding

    sharding = SingleDeviceSharding(targets.devices(target)[0])
    answer({"versions": versions()})
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer(figures(target, sharding, job["library"], job["case"]))
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})


def versions() -> dict[str, str]:
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def figures(target: str, sharding: Any, library: str, case: dict[str, Any]) -> dict[str, Any]:
    import compiled_programs
    import compiled_text
    import jax

    jax.clear_caches()
    start = time.process_time()
    program = compiled_programs.program(library, case)
    compiled = compiled_programs.compile_for(sharding, program, targets.OPTIONS.get(target))
    seconds = time.process_time() - start
    return compiled_text.figures(compiled, program.elements) | {"compile_seconds": seconds}


if __name__ == "__main__":
    main()
