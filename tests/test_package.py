"""What importing the package loads, and what it offers."""

import ast
import importlib.resources
import inspect
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bnjax

PUBLIC = {
    "CovMoments",
    "MOMENTS_NAME",
    "Moments",
    "affine",
    "batch_norm",
    "batch_renorm",
    "convs_and_dots_saveable",
    "cov_moments",
    "decay_mask",
    "drift",
    "drift_table",
    "ema",
    "fold",
    "from_torch",
    "from_torch_model",
    "merge",
    "merge_stacked",
    "moments",
    "normalize",
    "pmerge",
    "recalibrate",
    "to_torch",
    "update_stats",
    "whiten",
}


def in_a_fresh_interpreter(code):
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=120)


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_flax_and_the_layers_load_on_first_use(name):
    in_a_fresh_interpreter(
        "import sys, bnjax; assert not [m for m in sys.modules if m.split('.')[0] == 'flax']; "
        f"assert 'bnjax.{name}' not in sys.modules; bnjax.{name}.BatchNorm; "
        f"assert 'bnjax.{name}' in sys.modules; assert 'bnjax.{name}' == bnjax.{name}.__name__"
    )


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_each_layer_can_be_imported_by_itself_and_starts_no_backend(name):
    """So that devices and distributed runs can still be set up afterwards."""
    in_a_fresh_interpreter(
        f"from bnjax.{name} import BatchNorm; import bnjax.{name}, jax; "
        "jax.config.update('jax_num_cpu_devices', 3); "
        "jax.config.update('jax_platforms', 'cpu'); assert jax.device_count() == 3"
    )


def test_an_unknown_attribute():
    with pytest.raises(AttributeError) as error:
        _ = bnjax.linnen
    assert str(error.value) == "module 'bnjax' has no attribute 'linnen'"
    assert not hasattr(bnjax, "utils")


def test_the_package_is_typed():
    assert importlib.resources.files(bnjax).joinpath("py.typed").is_file()


def test_the_public_names():
    assert set(bnjax.__all__) == PUBLIC | {"linen", "nnx"}
    assert dir(bnjax) == sorted([*bnjax.__all__, "__version__"])
    assert all(hasattr(bnjax, name) for name in bnjax.__all__)


LAYERS = {
    "linen": {"BatchNorm", "BatchRenorm", "DecorrelatedBatchNorm", "apply_folded", "fold"},
    "nnx": {"BatchMoments", "BatchNorm", "BatchRenorm", "DecorrelatedBatchNorm", "fold"},
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_public_names_of_the_layers(name):
    """And pickles, which say where a class lives, survive moves between files."""
    module = getattr(bnjax, name)
    assert set(module.__all__) == LAYERS[name]
    assert dir(module) == sorted(module.__all__)
    for public in LAYERS[name]:
        assert getattr(module, public).__module__ == f"bnjax.{name}"
        assert pickle.loads(pickle.dumps(getattr(module, public))) is getattr(module, public)


@pytest.mark.parametrize("kind", [bnjax.Moments, bnjax.CovMoments])
def test_a_statistic_is_pickled_under_its_public_name(kind):
    m = kind(1.0, 2.0)
    assert b"bnjax\n" in pickle.dumps(m, 0)
    assert pickle.loads(pickle.dumps(m)) == m


@pytest.mark.parametrize("name", sorted(PUBLIC - {"CovMoments", "MOMENTS_NAME", "Moments"}))
def test_every_public_function_has_an_example(name):
    assert ">>> import bnjax" in inspect.getdoc(getattr(bnjax, name))


def test_the_version_is_a_number():
    assert all(part.isdigit() for part in bnjax.__version__.split("."))


def test_no_test_file_imports_another():
    """What they share lies in modules beside them: `checks`, `samples`, `reference`, ..."""
    for file in Path(__file__).parent.glob("test_*.py"):
        assert not re.findall(r"^\s*(?:from|import) test_\w+", file.read_text(), re.MULTILINE), file


ORDER = [
    *("_arguments", "_rounding", "_xla", "_masks"),
    *("_statistic", "_sums", "_moments", "_covariance", "_average"),
    *("_normalize", "_renormalize", "_whiten"),
    *("_trees", "_recalibrate", "_drift", "_decay"),
    *("_fold", "_fold_model", "_fold_check", "_torch"),
    *("_layer", "linen", "nnx"),
]


def imports(path):
    """`(file, name)` of all that a file imports from others of the package, as ORDER calls them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "bnjax":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}".split(".")
                yield whole[1], whole[-1] if len(whole) > 2 else None
        elif isinstance(node, ast.Import):
            for whole in (alias.name.split(".") for alias in node.names):
                if whole[0] == "bnjax":
                    yield whole[1], None


def test_imports_run_one_way():
    """Each file builds on those before it; the wings not on each other. What begins with an
    underscore stays in its file."""
    package = Path(bnjax.__file__).parent
    met = set()
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        met.add(own)
        for file, name in imports(path):
            inside = file == own and path.parent != package
            wings = {own, file} == {"linen", "nnx"}
            earlier = ORDER.index(file) < ORDER.index(own) and not wings
            assert earlier or inside, f"{path.name} imports from {file}"
            assert not (name or "").startswith("_"), f"{path.name} imports {name}"
    assert met == set(ORDER)


def test_contributors_are_told_that_order():
    page = Path(__file__).parents[1] / "notebooks" / "guide" / "contributing.md"
    table = page.read_text().split("| file | its idea |")[1].split("\n\n")[0]
    listed = re.findall(r"`(\w+)(?:\.py|/)`", "".join(re.findall(r"^\|([^|]*)\|", table, re.M)))
    assert listed == ORDER
