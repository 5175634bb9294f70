"""A process that is asked in lines of JSON, and asleep unless it is asked."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Worker:
    """`introduction` is for its first answer, which it gives unasked."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=os.environ | environment,
                text=True,
            )
        self.introduction: dict[str, Any] = {}

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"the process ended, see {self.log}"}

    def ask(self, **job: Any) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps(job), file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def library_worker(library: str, folder: Path) -> Worker:
    """The process of worker.py for one library."""
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), library]
    environment = {
        "KERAS_BACKEND": "jax",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the libraries share an accelerator
    }
    return Worker(command, folder / f"{library}.log", environment)
