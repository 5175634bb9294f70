"""Breaks the package, one line at a time, in a copy, and runs the tests that should notice.

    python tests/mutations.py            # every mutation
    python tests/mutations.py remainder  # those whose lines hold this text

Prints what became of each; the exit status says whether any survived, or is out of date: its text
must stand in the package once. Whatever a test notices must pass again without the mutation.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("bnjax", "tests", "notebooks", "README.md", "pyproject.toml")

# The text, what takes its place, and the tests (of tests/test_*.py) that should notice.
MUTATIONS = [
    # Arguments and masks
    ("0 <= np.asarray(momentum) <= 1", "0 <= np.asarray(momentum)", "inputs"),
    ("if missing and w.size != 1 and lacks_features:", "if False:", "inputs"),
    ("| jnp.isfinite(d), d, fill)", ", d, fill)", "moments normalize properties"),
    ("if w.shape[i] == 1\n", "if w.shape[i] > 0\n", "moments"),
    # Rounding, and what is there for a compiler's sake
    ("((a - by) - (high - by)) + b", "0 * b", "moments ema"),
    ("v if jnp.iscomplexobj(v) else v / ones for v in vs", "v for v in vs", "memory"),
    ("return c / ones[0], c / ones[1]", "return c, c", "memory"),
    ("(*primals), tangents[1]", "(*primals), once(primals[0], tangents[1])[0]", "memory"),
    ("-0.5 * tangents[0] * r * r * r", "-0.5 * tangents[0] * r / primals[0]", "memory"),
    (">= jnp.finfo(given.dtype).min", ">= 0", "normalize"),
    ("return lax.optimization_barrier((x, c))", "return x, c", "memory"),
    ("checkpoint_name(a, MOMENTS_NAME)", "a", "memory"),
    ("max(32, 8 * size)", "10**9", "whiten"),
    # Pivots
    ("FAR = 2.0", "FAR = 1e30", "moments normalize"),
    ("c = jnp.where(jnp.isfinite(c), c, 0)", "c = c + 0", "sums"),
    ("zero = jnp.where(c == c, 0.0, 0.0)", "zero = c - c", "sums"),
    ('samples=("auto",)', "samples=()", "memory"),
    # Merging
    ("(1 - share) * a.shift(delta, change)", "0 * change", "moments"),
    (" + (small.remainder - large.remainder)", "", "moments"),
    ("(seen, (m.mean - pivot) + m.remainder, 0)", "(seen, m.mean - pivot, 0)", "moments"),
    ("jnp.where(count > 0, second, kind.unseen(second))", "second", "moments whiten"),
    ("delta[..., :, None] * jnp.conj(delta)", "delta[..., :, None] * (delta)", "whiten"),
    (" + lost * CovMoments.unseen(m2)", "", "whiten"),
    # Remembering
    ("jnp.expm1(log) / jnp.expm1(t * log)", "-jnp.expm1(log)", "ema"),
    ("jnp.where(above, m.count - ddof, 1)", "jnp.where(above, m.count, 1)", "ema"),
    ("(new.mean - old.mean) + (new.remainder - old.remainder)", "new.mean - old.mean", "ema"),
    ("jnp.any(m.count > 0).astype(steps.dtype)", "jnp.ones_like(steps)", "trees"),
    # Applying
    ("m1 = (mean - c) + rest", "m1 = rest", "normalize"),
    ("rest = jnp.broadcast_to(m.remainder, mean.shape)\n", "rest = 0 * mean\n", "normalize"),
    ("@recomputed\ndef _scaled", "def _scaled", "memory"),
    ("(old.var + epsilon)), 1 / r_max,", "(old.var + epsilon)), 0,", "renorm"),
    (" + (batch.remainder - old.remainder)\n", "\n", "renorm"),
    ("jnp.where(fine[:, None], 0, tolerance) * variances", "0 * variances", "whiten"),
    ("jnp.maximum(lacks, 0)", "(0 * lacks)", "whiten"),
    # Layers
    ('!= "batch" and not initializing and', '!= "batch" and', "linen"),
    ("m = m if axis_name is None else pmerge(", "m = m if True else pmerge(", "ghost"),
    ('not emits or self.is_mutable_collection("batch_stats")', "not emits", "trees"),
    ("lax.stop_gradient(value))", "value)", "nnx"),
    ("            m = cast(m, promote(x.dtype, jnp.result_type(m.mean)))\n", "", "eval_momentum"),
    ("seen = finite[0] & finite[1]", "seen = finite[0]", "eval_momentum"),
    # Networks
    ("jnp.max(steps, 0)", "jnp.min(steps, 0)", "trees"),
    ("jnp.where(finite, new, old)", "new", "recalibrate"),
    ("(m.mean - running.mean + m.remainder)", "(m.mean - running.mean)", "drift"),
    ("shapes.get(path[:-1], ())", "set().union(*shapes.values())", "decay"),
    ("seen & dead, stderr", "dead, stderr", "drift"),
    ("own.astype(dtype) * mul + add", "own.astype(dtype) + add", "fold"),
    ("for side in (sides, -sides)", "for side in (abs(sides),)", "fold_model"),
    ("for factors in (some, others))", "for factors in ())", "fold_model"),
    ("pairs, run, shifts=True)", "pairs, run, shifts=False)", "fold_model"),
]  # fmt: skip
if jax.__version_info__ < (0, 10):  # from there on `once` keeps a quotient whole, too
    MUTATIONS.append(("s = a + rounded(b)", "s = a + b", "search"))


def place(text, folder):
    """The one file in which this text stands, once; or None."""
    files = [file for file in (folder / "bnjax").rglob("*.py") if text in file.read_text()]
    return files[0] if len(files) == 1 and files[0].read_text().count(text) == 1 else None


def run(folder, tests):
    """The first test that fails in this copy, or None."""
    command = [sys.executable, "-m", "pytest", "-x", "--tb=no", "-p", "no:cacheprovider", *tests]
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "PYTHONDONTWRITEBYTECODE": "1",  # a file may change twice in a second
    }
    done = subprocess.run(
        command, cwd=folder, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if failed is None:
        raise SystemExit(f"No test ran:\n{done.stdout}\n{done.stderr}")
    return failed[1]


def fate(folder, file, text, replacement, names):
    """What became of a mutation: whether it survived, and in words."""
    if file is None:
        return True, "out of date: the text does not stand there once"
    whole = file.read_text()
    file.write_text(whole.replace(text, replacement))
    failed = run(folder, [f"tests/test_{name}.py" for name in names.split()])
    file.write_text(whole)
    if failed is None:
        return True, "survived"
    if run(folder, [failed]) is not None:
        return True, f"{failed} fails without it, too"
    return False, failed


def main():
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [mutation for mutation in MUTATIONS if wanted in mutation[0]]
    survivors = 0
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        for text, replacement, names in chosen:
            file = place(text, folder)
            survived, words = fate(folder, file, text, replacement, names)
            survivors += survived
            where = file.relative_to(folder) if file else "bnjax"
            print(f"{where}: {text.strip()!r} -> {replacement.strip()!r}: {words}", flush=True)
    print(f"{survivors} of {len(chosen)} survived")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main())
