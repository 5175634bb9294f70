"""A small search for programs that rounding spoils; `python tests/search.py` is the large one."""

import jax
import pytest
import search

from bnjax import _xla


@pytest.mark.parametrize(("backend", "programs"), [(None, 20), ("gpu", 8), ("tpu", 8)])
def test_none_of_these_programs_is_beyond_a_bound(backend, programs, monkeypatch):
    """The same ones in every run. By the programs that run here, and by other backends'."""
    monkeypatch.setattr(_xla, "forced", None)
    faults, worst = search.search(search.cases(programs, seed=0), 4, backend)
    jax.clear_caches()
    assert not faults, "\n".join(f"{case}: {search.figures(of)}" for case, of in faults.items())
    assert len(worst) > programs // 2  # forms
