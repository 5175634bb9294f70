"""Strict promotion, eight fake CPU devices, and what XLA compiles kept: set before JAX starts.

Most files ask what is computed, not how it is rounded, and LLVM need not optimize their machine
code: XLA's passes are the same, and a program is compiled in three quarters of the time. A file
with `pytestmark = pytest.mark.optimized` looks at the last digits, or trains, and gets the code
that users get.
"""

import ctypes
import os
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# In the environment, so that the programs which tests start share the cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

STATM = Path("/proc/self/statm")  # pages in all, resident pages, ...
pytest.register_assert_rewrite("checks", "layouts", "whitening")  # to print what they compared
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def compile_as_marked(request):
    """And JAX keeps all that it compiled: a worker holds the programs of one file at a time."""
    optimized = request.node.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    forget_programs()


@pytest.fixture(autouse=True)
def stay_within_memory():
    """Nor does it hold much more than 1 GB of them, where the system says what it holds."""
    yield
    if STATM.exists() and int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") > 2**30:
        forget_programs()


def forget_programs():
    jax.clear_caches()
    if STATM.exists():
        ctypes.CDLL(None).malloc_trim(0)  # what is freed goes back to the system
