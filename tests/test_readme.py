"""Every example of the README runs, on its own, and prints what the README says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, re.DOTALL)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]?\d+)?")


@pytest.mark.parametrize(("code", "output"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_prints_what_the_readme_says(code, output, tmp_path):
    # Without the strict settings and the fake devices of these tests: as a reader would run it.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if output:
        # Trained numbers differ in the second digit between versions of JAX; words do not.
        assert NUMBER.sub("#", done.stdout) == NUMBER.sub("#", output)
        numbers = [np.array(NUMBER.findall(text), float) for text in (done.stdout, output)]
        np.testing.assert_allclose(*numbers, atol=0.03)


def test_every_figure_of_the_table_is_still_measured():
    table = README.split("<!-- differences -->")[1].split("<!-- end -->")[0]
    script = Path(__file__).parent / "bench" / "differences.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    ours = [row.split("|")[3].strip() for row in done.stdout.splitlines() if row.startswith("| ")]
    said = [row.split("|")[3].strip() for row in table.splitlines() if row.startswith("| ")]
    assert len(said) == len(ours) > 5
    for new, old in zip(ours, said, strict=True):
        numbers = [np.array(NUMBER.findall(cell), float) for cell in (new, old)]
        np.testing.assert_allclose(*numbers, rtol=0.5, atol=1e-6)
