"""Breaks the package, one line at a time, in a copy, and runs the tests that should notice.

    python tests/mutations.py            # every mutation
    python tests/mutations.py remainder  # those whose lines hold this text

Prints what became of each; the exit status says whether any survived. A mutation is found by its
text, which must stand in the package once. Whatever a test notices must pass again without it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

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
    ("(a - (high - moved)) + (b - moved)", "b - moved", "moments ema"),
    ("return v / lax.optimization_barrier(jnp.ones_like(v))", "return v", "memory"),
    ("checkpoint_name(a, MOMENTS_NAME)", "a", "memory"),
    ("max(32, 8 * size)", "10**9", "whiten"),
    # Merging
    ("within + share_a * share_b * a.shift(delta, a.second)", "within", "moments"),
    ("(b.mean - a.mean) + (b.remainder - a.remainder)", "b.mean - a.mean", "moments"),
    ("delta = (m.mean - pivot) + m.remainder\n", "delta = m.mean - pivot\n", "moments devices"),
    ("jnp.where(count > 0, second, kind.unseen(second))", "second", "moments whiten"),
    ("delta[..., :, None] * jnp.conj(delta)", "delta[..., :, None] * (delta)", "whiten"),
    (" + lost * CovMoments.unseen(m2)", "", "whiten"),
    # Remembering
    ("jnp.expm1(log) / jnp.expm1(t * log)", "-jnp.expm1(log)", "ema"),
    ("jnp.where(above, m.count - ddof, 1)", "jnp.where(above, m.count, 1)", "ema"),
    ("(e1 + new_rest - old.remainder)", "new_rest", "ema"),
    ("jnp.any(m.count > 0).astype(steps.dtype)", "jnp.ones_like(steps)", "trees"),
    # Applying
    ("about_c = Moments(ranked(mean - c),", "about_c = Moments(0 * ranked(c),", "normalize"),
    ("rest = jnp.broadcast_to(m.remainder, mean.shape)\n", "rest = 0 * mean\n", "normalize"),
    ("@functools.partial(jax.checkpoint, static_argnums=(6, 7))\n", "", "memory"),
    ("(old.var + epsilon)), 1 / r_max,", "(old.var + epsilon)), 0,", "renorm"),
    (" + (batch.remainder - old.remainder)\n", "\n", "renorm"),
    ("jnp.where(fine[:, None], 0, tolerance) * variances", "0 * variances", "whiten"),
    ("jnp.maximum(lacks, 0)", "(0 * lacks)", "whiten"),
    # Layers
    ('== "running" and not initializing else None', '== "running" else None', "linen"),
    ("y, m if axis_name is None else pmerge(", "y, m if True else pmerge(", "ghost"),
    ('if not emits or self.is_mutable_collection("batch_stats"):', "if not emits:", "trees"),
    ("= lax.stop_gradient(value)", "= value", "nnx"),
    # Networks
    ("jnp.max(steps, 0)", "jnp.min(steps, 0)", "trees"),
    ("jnp.where(finite, new, old)", "new", "recalibrate"),
    ('(m.mean - stats["mean"] + m.remainder)', '(m.mean - stats["mean"])', "drift"),
    ("shapes.get(path[:-1], ())", "set().union(*shapes.values())", "decay"),
    ("own.astype(dtype) * mul + add", "own.astype(dtype) + add", "fold"),
]  # fmt: skip


def place(text):
    """The file in which this text stands, and nowhere else."""
    files = [file for file in (ROOT / "bnjax").rglob("*.py") if text in file.read_text()]
    if len(files) != 1 or files[0].read_text().count(text) != 1:
        raise SystemExit(f"{text!r} stands in {[f.name for f in files]}: it must stand there once.")
    return files[0].relative_to(ROOT)


def run(folder, tests):
    """The first test that fails in this copy, or None."""
    command = [sys.executable, "-m", "pytest", "-x", "--tb=no", "-p", "no:cacheprovider", *tests]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | cache, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if failed is None:
        raise SystemExit(f"No test ran:\n{done.stdout}\n{done.stderr}")
    return failed[1]


def fate(text, replacement, names):
    """What became of a mutation: (survived, in words)."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(folder, name))
        file = Path(folder, place(text))
        file.write_text(file.read_text().replace(text, replacement))
        failed = run(folder, [f"tests/test_{name}.py" for name in names.split()])
        if failed is None:
            return True, "survived"
        shutil.copy(ROOT / place(text), file)
        if run(folder, [failed]) is not None:
            return True, f"{failed} fails without it, too"
        return False, failed


def main():
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [mutation for mutation in MUTATIONS if wanted in mutation[0]]
    for text, _, _ in chosen:
        place(text)
    survivors = 0
    for text, replacement, names in chosen:
        survived, words = fate(text, replacement, names)
        survivors += survived
        print(f"{place(text)}: {text.strip()!r} -> {replacement.strip()!r}: {words}", flush=True)
    print(f"{survivors} of {len(chosen)} survived")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main())
