"""Programs that others wrote, as they wrote them, and the table of how ours agree with them.

`make programs` makes the environment, runs what needs minutes, and writes the table of the guide.
With `--all` also what takes longer, and needs more packages.
"""

import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "notebooks" / "guide" / "programs.md"
TABLE = re.compile(r"(?<=<!-- programs -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)
HEAD = "| program | version | agreement | what changed |\n|---|---|---|---|\n"
jax.config.update("jax_numpy_dtype_promotion", "standard")  # unlike in our own tests
jax.config.update("jax_numpy_rank_promotion", "allow")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also the programs that take longer")


def pytest_ignore_collect(collection_path, config):
    """Some import what only the larger environment has."""
    return True if collection_path.name == "longer" and not config.getoption("--all") else None


@pytest.fixture(scope="session")
def flax_source():
    """The source distribution of the flax that is installed: its tests and examples."""
    name = f"flax-{version('flax')}"
    folder = ROOT / "build" / "programs"
    if not (folder / name).exists():
        options = ["--quiet", "--no-deps", "--no-binary", "flax", "--dest"]
        command = [sys.executable, "-m", "pip", "download", *options, folder]
        subprocess.run([*command, name.replace("-", "==")], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return folder / name


@pytest.fixture
def from_guide():
    """What the program under a heading of the page for other libraries' users defines."""

    def read(heading, name):
        page = PAGE.with_name("coming_from.md").read_text().split(f"\n## {heading}\n")[1]
        namespace = {}
        exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], namespace)
        return namespace[name]

    return read


@pytest.fixture
def row(record_property):
    """Says what a test found: a row of the table."""

    def say(program, package, agreement, changed):
        if not isinstance(agreement, str):
            agreement = f"{agreement:.0e}"
        release = f"{package} {version(package).split('+')[0]}"
        record_property("row", f"| {program} | {release} | {agreement} | {changed} |")

    return say


def pytest_terminal_summary(terminalreporter):
    """Prints the table, and writes it into the page. Rows of programs that did not run stay."""
    found = [
        value
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "row"
    ]
    terminalreporter.write_line("\n" + HEAD + "\n".join(found))
    text = PAGE.read_text()
    written = TABLE.search(text)[0].removeprefix(HEAD).splitlines()
    rows = {row.split("|")[1]: f"{row}\n" for row in [*written, *found]}
    rows = "".join(sorted(rows.values(), key=str.lower))
    PAGE.write_text(TABLE.sub(lambda _: HEAD + rows, text))
