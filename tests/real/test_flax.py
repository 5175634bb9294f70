"""Flax's own tests of batch norm, and of what reads layers, with ours in the place of flax's."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PARTS = {
    "linen": [
        "linen/linen_test.py",
        "linen/linen_transforms_test.py",
        "linen/linen_module_test.py",
        "linen/summary_test.py",
        "-k batch_norm or batchnorm or test_bind or SummaryTest",
    ],
    "NNX": [
        "nnx/nn/normalization_test.py",
        "nnx/transforms_test.py",
        "nnx/module_test.py",
        "nnx/summary_test.py",
        "nnx/bridge/wrappers_test.py",
    ],
}
# These train with one example. Under flax's settings our warning of that would be an error.
WARNED = {
    "linen": {"ModuleTest.test_bind_stateful"},
    "NNX": {
        "SummaryTest.test_tabulate",
        "TestScan.test_complex",
        "TestScan.test_complex_broadcast_dropout",
        "TestScan.test_complex_broadcast_dropout_view",
        "TestScan.test_complex_decorator",
        "TestScan.test_complex_decorator_view",
        "TestScan.test_complex_view",
        "TestVmap.test_split_rngs_decorator_simple",
        "TestVmap.test_state_axes_simple",
        "TestVmap.test_state_axes_super_simple",
    },
}


@pytest.mark.parametrize("wing", PARTS)
def test_flaxs_own_tests(wing, flax_source, tmp_path, row):
    warned = tmp_path / "warned"
    warned.touch()
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    options = ["-q", "-p", "flax_swapped", "-W", "default:One value per feature:UserWarning"]
    options += [part if part.startswith("-") else f"tests/{part}" for part in PARTS[wing]]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=flax_source,
        env=os.environ | {"PYTHONPATH": path, "ONE_VALUE": str(warned)},
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0
    tests = warned.read_text().split()
    names = {test.split("::", 1)[1].replace("::", ".") for test in tests}
    assert {re.sub(r"(_functional)?\d$", "", name) for name in names} == WARNED[wing]
    passed = re.search(r"(\d+) passed", done.stdout)[1]
    files = ", ".join(Path(part).stem for part in PARTS[wing] if not part.startswith("-"))
    row(
        f"flax's tests of {wing}, in {files}",
        "flax",
        f"{passed} of {passed} pass",
        f"the import; {len(names)} train with one example, and our layer warns of it",
    )
