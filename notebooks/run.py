"""Executes the notebooks of this folder, each from a clean kernel. Fails where a cell fails.

    python run.py                     # all notebooks
    python run.py 4_masks*.ipynb      # these
    python run.py --seed 7            # with another SEED than the committed one
    python run.py --write             # and store the outputs in place

What a notebook claims is asserted in its cells, so a claim that does not hold fails the run.
"""

import argparse
import base64
import io
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
LOCAL = {str(FOLDER.parent): ".", sys.prefix: "python", str(Path.home()): "~"}
ONE_CELL = re.escape(tempfile.gettempdir()) + r"/ipykernel_\d+/\d+\.py"
COLORS = re.compile(r"\x1b\[[0-9;]*m")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def set_seed(notebook, seed):
    """Replaces the line `SEED = ...`; says whether there is exactly one."""
    found = 0
    for cell in code_cells(notebook):
        cell.source, n = re.subn(r"^SEED = .*$", f"SEED = {seed}", cell.source, flags=re.MULTILINE)
        found += n
    return found == 1


def execute(notebook, limit, bar):
    """Runs all cells within `limit` seconds; returns what went wrong, or None."""
    resources = {"metadata": {"path": str(FOLDER)}}
    client = NotebookClient(notebook, resources=resources, kernel_name="python3")
    client.record_timing = False
    client.coalesce_streams = True
    client.extra_arguments = ["--log-level=ERROR"]  # warnings would tear the progress bar
    end = time.monotonic() + limit
    with client.setup_kernel():
        for number, cell in enumerate(code_cells(notebook), start=1):
            client.timeout = max(1, round(end - time.monotonic()))
            try:
                client.execute_cell(cell, notebook.cells.index(cell))
            except CellTimeoutError:
                return f"cell [{number}] was running when the {limit} s for a notebook were over"
            except (CellExecutionError, DeadKernelError) as error:
                return f"cell [{number}] failed:\n{COLORS.sub('', str(error))}"
            bar.update()
    return None


def hide_paths(text):
    text = re.sub(ONE_CELL, "<cell>", text)
    for path, name in LOCAL.items():
        text = text.replace(path, name)
    return text


def shrink(png):
    """The same picture in at most 256 colours: a third of the bytes."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    file = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode() + "\n"


def clean(notebook):
    """Small pictures, and nothing that another run on another machine would change."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in code_cells(notebook):
        cell.metadata.pop("execution", None)
        for output in cell.outputs:
            if "text" in output:
                output.text = hide_paths(output.text)
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/"):
                    output.data[kind] = hide_paths(value)
                elif kind == "image/png":
                    output.data[kind] = shrink(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("notebooks", nargs="*", type=Path, help="all of the folder unless given")
    add("--limit", type=int, default=120, help="seconds for each notebook: %(default)s")
    seed_or_write = parser.add_mutually_exclusive_group()
    add = seed_or_write.add_argument
    add("--seed", type=int, help="replaces the line SEED = ... for this run")
    add("--write", action="store_true", help="store the outputs in the notebooks")
    args = parser.parse_args()

    paths = args.notebooks or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        if not path.is_file():
            parser.error(f"there is no notebook {path}")
    notebooks = {path: nbformat.read(path, as_version=4) for path in paths}
    for path, notebook in notebooks.items():
        if args.seed is not None and not set_seed(notebook, args.seed):
            parser.error(f"{path.name} needs exactly one line SEED = ...")

    failures, times = {}, {}
    with tqdm(total=sum(len(code_cells(n)) for n in notebooks.values()), unit="cell") as bar:
        for path, notebook in notebooks.items():
            bar.set_description(path.name)
            start = time.monotonic()
            failure = execute(notebook, args.limit, bar)
            times[path] = time.monotonic() - start
            if failure is not None:
                failures[path] = failure
            elif args.write:
                clean(notebook)
                nbformat.write(notebook, path)
    for path, seconds in times.items():
        print(f"{path.name}: {seconds:.0f} s, {'FAILED' if path in failures else 'passed'}")
    for path, failure in failures.items():
        print(f"\n{path.name}, {failure}", file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
