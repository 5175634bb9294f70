"""Two processes with two devices each: one batch over all four, and a run that is killed.

To start a process takes longer than what it does, so the unbroken run goes with the table.
"""

import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import layouts
import numpy as np
import pytest
from layouts import SETTINGS, assert_is_whole_batch

WORKER = Path(__file__).with_name("two_processes.py")
CASES = ("no mask", "uneven mask", "one replica masked", "weights")
QUICKLY = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiled, as in other files
LIMIT = 120  # seconds for a run, on a busy machine
GRACE = 40  # seconds for the second process to end after the first


def run(task, folder, killed=None, last_step=None):
    """Runs both processes to their ends: `[(exit code, all that it printed), ...]`.

    It is a `subprocess.TimeoutExpired` if the first (the one that kills itself, if there is one)
    runs for longer than LIMIT, or the second lives on for longer than GRACE after it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = [] if killed is None else [str(killed), str(last_step)]
    files = [folder / f"printed{i}.txt" for i in range(2)]
    processes = []
    try:
        for i, path in enumerate(files):
            command = [sys.executable, WORKER, task, address, str(i), folder, *options]
            with path.open("w") as out:
                processes.append(subprocess.Popen(command, stdout=out, stderr=out, env=QUICKLY))
        first = killed or 0
        processes[first].wait(LIMIT)
        processes[1 - first].wait(GRACE)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        print(*(path.read_text() for path in files if path.exists()))
    return [(p.returncode, path.read_text()) for p, path in zip(processes, files, strict=True)]


def put_digits(folder):
    from sklearn.datasets import load_digits  # a second to import

    images, labels = load_digits(return_X_y=True)
    digits = pickle.dumps((images.astype(np.float32), labels.astype(np.int32)))
    (folder / "digits.pickle").write_bytes(digits)


@pytest.fixture(scope="module")
def inputs():
    """One row each, of a case and a setting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "DEVICES", 4)  # so that the masked replica is a whole one
        masks = layouts.cases()
    return {
        (case, setting): (*batch[:2], masks[case], *batch[2:])
        for case in CASES
        for setting, batch in ((name, layouts.batch(*s)) for name, s in SETTINGS.items())
        if setting != "bf16" or case == "uneven mask"
    }


@pytest.fixture(scope="module")
def unbroken(inputs, tmp_path_factory):
    """Where both processes took a step with each of the inputs, and trained from start to end."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "inputs.pickle").write_bytes(pickle.dumps(inputs))
    put_digits(folder)
    assert [code for code, _ in run("both", folder)] == [0, 0]
    return folder


def test_two_processes_give_the_whole_batch(inputs, unbroken):
    for i in range(2):
        output = (unbroken / f"results{i}.pickle").read_bytes()
        processes, shards, results = pickle.loads(output)
        assert (processes, shards) == (2, [(16, 6), (16, 6)])
        assert len(results) == 2 * len(inputs)
        for (key, layout), result in results.items():
            try:
                assert_is_whole_batch(result, *inputs[key])
            except AssertionError as error:
                error.add_note(f"seen by process {i}: {layout}, {key}")
                raise


def start_of(results):
    """After how many steps both processes started."""
    first, second = (re.search(r"starts after (\d+) steps", printed)[1] for _, printed in results)
    assert first == second
    return int(first)


def test_a_killed_run_resumes_bit_for_bit(unbroken, tmp_path):
    """Each process is killed once, at a random step; JAX itself ends the survivor."""
    seed = int(os.environ.get("KILL_SEED", time.time()))
    chance = random.Random(seed)
    victims = chance.sample((0, 1), 2)
    steps = chance.randint(7, 11), chance.randint(15, 20)
    print(f"KILL_SEED={seed}: processes {victims} are killed after {steps} steps")
    put_digits(tmp_path)
    starts = []
    for victim, step in zip(victims, steps, strict=True):
        results = run("train", tmp_path, victim, step)
        starts.append(start_of(results))
        assert results[victim][0] == -signal.SIGKILL
        code, printed = results[1 - victim]
        assert code not in (0, -signal.SIGKILL)
        assert "This most likely indicates that another task died" in printed
        assert not list(tmp_path.glob("state*"))
    results = run("train", tmp_path)
    assert [code for code, _ in results] == [0, 0]
    starts.append(start_of(results))
    # There is a checkpoint every 3 steps. The last may be unfinished, the one before it is not.
    assert starts[0] == 0
    assert steps[0] - 6 <= starts[1] < steps[0]
    assert steps[1] - 6 <= starts[2] < steps[1]

    for i in range(2):
        whole, resumed = (
            pickle.loads((folder / f"state{i}.pickle").read_bytes())
            for folder in (unbroken, tmp_path)
        )
        assert whole["step"] == 20
        chex.assert_tree_all_finite(whole)
        chex.assert_trees_all_equal(resumed, whole, strict=True)
