"""A small search for programs that rounding spoils; `python tests/search.py` is the large one."""

import jax
import pytest
import search
from search import Case

from bnjax import _xla

pytestmark = pytest.mark.optimized

# Where JAX 0.8 forms a mean twice, an ulp apart, unless its quotient is rounded first.
TWO_MEANS = [
    Case("nnx, running", "jit", ("dx", "m"), rows=42, features=46, replicas=1, seed=19),
    Case("linen, batch", "jit", ("dx", "m"), rows=18, features=15, replicas=1, seed=35),
    Case("linen, renorm", "jit", ("dx",), rows=6, features=48, replicas=1, seed=41),
]


@pytest.mark.parametrize(("backend", "programs"), [(None, 14), ("gpu", 6), ("tpu", 6)])
def test_none_of_these_programs_is_beyond_a_bound(backend, programs, monkeypatch):
    """The same ones in every run. By the programs that run here, and by other backends'."""
    monkeypatch.setattr(_xla, "forced", None)
    faults, worst = search.search(search.cases(programs, seed=0), 4, backend)
    jax.clear_caches()
    assert not faults, "\n".join(f"{case}: {search.figures(of)}" for case, of in faults.items())
    assert len(worst) > programs // 2  # forms


@pytest.mark.parametrize("case", TWO_MEANS, ids=str)
def test_the_mean_is_one_value(case):
    found = search.errors(case, 4)
    assert max(found.values()) <= 1, search.figures(found)
