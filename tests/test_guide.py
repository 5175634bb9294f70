"""Every program of the README and the guide runs, on its own, and prints what the page says."""

import contextlib
import io
import multiprocessing
import os
import re
import runpy
import sys
import tomllib
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.extend.backend import clear_backends

import bnjax

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "notebooks" / "guide").glob("*.md"))]
PROGRAM = re.compile(
    r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE
)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]?\d+)?")


PROGRAMS = [
    pytest.param(code, output, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, (code, output) in enumerate(PROGRAM.findall(page.read_text()), 1)
]


def forget_fake_devices():
    os.environ.pop("XLA_FLAGS", None)


def start_reader():
    forget_fake_devices()
    jax.config.update("jax_disable_most_optimizations", True)  # as in the other files


@pytest.fixture(scope="module")
def reader():
    """An interpreter without the strict settings and the fake devices of these tests.

    One for all programs: to start JAX takes longer than most of them.
    """
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawning, start_reader) as pool:
        yield pool


@contextlib.contextmanager
def devices_not_counted():
    """JAX as before its first array: how many devices a CPU plays cannot be said later."""
    clear_backends()
    try:
        yield
    finally:
        clear_backends()
        jax.config.update("jax_num_cpu_devices", -1)
        forget_fake_devices()


def run(code, folder):
    """What the program prints, as a script of its own: nothing of an earlier one is left."""
    os.chdir(folder)
    script = Path(folder, "program.py")
    script.write_text(code)
    sys.argv = [str(script)]
    counts = re.search(r"^jax.*jax_num_cpu_devices", code, re.MULTILINE)
    with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings():
        warnings.filterwarnings("error", category=DeprecationWarning, module="__main__")
        with devices_not_counted() if counts else contextlib.nullcontext():
            runpy.run_path(str(script), run_name="__main__")
    return printed.getvalue()


def assert_prints(printed, output):
    """Trained numbers differ in the second digit between versions of JAX; words do not."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", output)
    numbers = [np.array(NUMBER.findall(text), float) for text in (printed, output)]
    np.testing.assert_allclose(*numbers, atol=0.03)


@pytest.mark.parametrize(("code", "output"), PROGRAMS)
def test_a_program_prints_what_its_page_says(code, output, reader, tmp_path):
    printed = reader.submit(run, code, tmp_path).result()
    if output:
        assert_prints(printed, output)


def test_every_figure_of_the_table_is_still_measured(reader, tmp_path):
    table = README.read_text().split("<!-- differences -->")[1].split("<!-- end -->")[0]
    script = (Path(__file__).parent / "bench" / "differences.py").read_text()
    code = f'import jax\njax.config.update("jax_num_cpu_devices", 2)\n{script}'
    printed = reader.submit(run, code, tmp_path).result()
    ours = [row.split("|")[3].strip() for row in printed.splitlines() if row.startswith("| ")]
    said = [row.split("|")[3].strip() for row in table.splitlines() if row.startswith("| ")]
    assert len(said) == len(ours) > 5
    for new, old in zip(ours, said, strict=True):
        numbers = [np.array(NUMBER.findall(cell), float) for cell in (new, old)]
        np.testing.assert_allclose(*numbers, rtol=0.5, atol=1e-6)


def test_the_package_index_gets_no_link_or_picture_that_leads_nowhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    hook = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = README.read_text()
    assert "](notebooks/" in text
    for rule in hook["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert "where in a network it belongs" in text
    assert re.findall(r"\]\((?!https?:).*|<!--.*", text) == []


def test_the_reference_has_every_public_name():
    documented, module = [], None
    for page in (ROOT / "notebooks" / "reference").glob("*.rst"):
        for directive, name in re.findall(r"^\.\. (\w+):: (\S+)", page.read_text(), re.MULTILINE):
            if directive == "currentmodule":
                module = name
            elif directive.startswith("auto"):
                documented.append(name if name.startswith("bnjax.") else f"{module}.{name}")
    public = [f"{m.__name__}.{n}" for m in (bnjax, bnjax.linen, bnjax.nnx) for n in m.__all__]
    assert sorted(documented) == sorted(set(public) - {"bnjax.linen", "bnjax.nnx"})
