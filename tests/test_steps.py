"""`steps`, the number of updates: who needs it, in which form it comes, and what if it is gone."""

import re
import warnings

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same_bits
from flax import nnx
from samples import well_scaled

import bnjax.linen
import bnjax.nnx

KEY = jax.random.key(0)
X = well_scaled(1, (8, 3))
TRAINED = {"mean": jnp.array([1.0, 2.0, 3.0]), "var": jnp.array([4.0, 5.0, 6.0])}
COUNTS = {
    "debias": {"debias": True},
    "momentum=None": {"momentum": None},
    "momentum schedule": {"momentum": lambda steps: 1 - 1 / (steps + 2)},
}
every_count = pytest.mark.parametrize("fields", COUNTS.values(), ids=COUNTS)
SAID = (
    "Steps are 0 or missing, but the running statistics are trained. Counted from 0, "
    "momentum=None and debias=True replace them in the first step. "
    "Give the number of updates that they come from as steps."
)


class Linen:
    """A layer with these statistics: `train` and `evaluate` give y, `stats` what is remembered."""

    def __init__(self, stats, kind="BatchNorm", **fields):
        self.layer, self.stats = getattr(bnjax.linen, kind)(**fields), stats

    def evaluate(self, x):
        return self.layer.apply(self.variables(), x, use_running_average=True)

    def train(self, x):
        y, updates = self.layer.apply(
            self.variables(), x, use_running_average=False, mutable=["batch_stats"]
        )
        self.stats = updates["batch_stats"]
        return y

    def variables(self):
        params = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
        return {"params": params, "batch_stats": self.stats}


class NNX:
    """The same of NNX."""

    def __init__(self, stats, kind="BatchNorm", **fields):
        self.layer = getattr(bnjax.nnx, kind)(3, rngs=nnx.Rngs(0), **fields)
        if "steps" not in stats:
            del self.layer.steps
        for name, value in stats.items():
            setattr(self.layer, name, nnx.BatchStat(value))

    def evaluate(self, x):
        return self.layer(x, use_running_average=True)

    def train(self, x):
        return self.layer(x)

    @property
    def stats(self):
        return nnx.to_pure_dict(nnx.state(self.layer, nnx.BatchStat))


both = pytest.mark.parametrize("make", [Linen, NNX])


@both
@every_count
def test_evaluation_needs_no_steps(make, fields):
    without, plain = make(TRAINED, **fields), make(TRAINED | {"steps": jnp.array(7)}, **fields)
    assert_same_bits(without.evaluate(X), plain.evaluate(X))
    assert set(without.stats) == {"mean", "var"}


@both
def test_emission_alone_needs_no_steps(make):
    fields = {"emit": "only"} if make is NNX else {}
    layer = make(TRAINED, momentum=None, pivot="batch", **fields)
    if make is NNX:
        layer.train(X)
        m = nnx.pop(layer.layer, bnjax.nnx.BatchMoments)["moments"]
    else:
        call = {"use_running_average": False, "mutable": ["moments"]}
        m = layer.layer.apply(layer.variables(), X, **call)[1]["moments"]["moments"]
    assert_same_bits(jax.tree.leaves(m), jax.tree.leaves(bnjax.moments(X)))
    assert set(layer.stats) == {"mean", "var"}


NUMBERS = [3, np.int64(3), np.int32(3), np.array(3), np.array(3, np.int64), np.float32(3), 3.0]


@both
@every_count
@pytest.mark.parametrize("steps", NUMBERS, ids=lambda n: f"{type(n).__name__}")
def test_numbers_of_any_kind_count(make, fields, steps):
    """As serialization restores them, and as other libraries begin with them."""
    layer, plain = (make(TRAINED | {"steps": n}, **fields) for n in (steps, jnp.array(3)))
    for expected in (4, 5):
        assert_same_bits(layer.train(X), plain.train(X))
        for name in ("mean", "var"):
            np.testing.assert_allclose(layer.stats[name], plain.stats[name], rtol=1e-6)
        assert isinstance(layer.stats["steps"], jax.Array)
        is_float = isinstance(steps, float | np.floating)
        assert layer.stats["steps"].dtype == (jnp.float32 if is_float else jnp.int32)
        assert layer.stats["steps"] == expected


@pytest.mark.parametrize("steps", NUMBERS, ids=lambda n: f"{type(n).__name__}")
def test_numbers_of_any_kind_count_in_trees(steps):
    m = {"norm": {"moments": bnjax.moments(X)}}
    updated, plain = (
        bnjax.update_stats({"norm": TRAINED | {"steps": n}}, m, momentum=None)["norm"]
        for n in (steps, jnp.array(3))
    )
    assert updated["steps"] == 4
    np.testing.assert_allclose(updated["mean"], plain["mean"], rtol=1e-6)


@both
@every_count
@pytest.mark.parametrize("steps", [2**31, np.int64(2**40), np.array(2**40)], ids=str)
def test_numbers_beyond_32_bits_stay_at_the_largest(make, fields, steps):
    """In an int32 they would wrap to a small or negative one, at which averages start anew."""
    layer, largest = (make(TRAINED | {"steps": n}, **fields) for n in (steps, 2**31 - 1))
    assert_same_bits(layer.train(X), largest.train(X))
    assert layer.stats["steps"] == 2**31 - 1
    for name in ("mean", "var"):
        assert_same_bits(layer.stats[name], largest.stats[name])


def test_emission_alone_with_scheduled_limits_counts_from_0():
    """`steps` cannot be made in a collection that `apply` does not name."""
    layer = bnjax.linen.BatchRenorm(
        False, r_max=lambda steps: jnp.where(steps < 1, 1.0, 3.0), d_max=0.0
    )
    params = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
    variables = {"params": params, "batch_stats": TRAINED}
    y, updates = layer.apply(variables, X, mutable=["moments"])
    assert set(updates) == {"moments"}
    counted = variables | {"batch_stats": TRAINED | {"steps": jnp.array(0)}}
    expected, _ = layer.apply(counted, X, mutable=["moments"])
    np.testing.assert_array_equal(y, expected)


def test_statistics_of_a_file_are_not_written_into():
    stats = {name: np.array(p) for name, p in TRAINED.items()} | {"steps": np.array(3)}
    kept = {name: p.copy() for name, p in stats.items()}
    for p in stats.values():
        p.flags.writeable = False
    layer = NNX(stats, debias=True)
    layer.train(X)
    chex.assert_trees_all_equal(stats, kept)
    assert layer.stats["steps"] == 4


def test_a_linen_state_through_flaxs_serialization():
    layer = bnjax.linen.BatchNorm(False, debias=True)
    variables = layer.init(KEY, X)
    data = flax.serialization.to_bytes(
        variables | layer.apply(variables, X, mutable=["batch_stats"])[1]
    )
    restored = flax.serialization.msgpack_restore(data)
    _, updates = layer.apply(restored, X, mutable=["batch_stats"])
    assert updates["batch_stats"]["steps"] == 2


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
@every_count
def test_steps_keep_their_dtype_in_a_scan(fields, dtype):
    """Also where a mean over replicas, as flax's ImageNet example takes it, made it a float."""
    layer = bnjax.linen.BatchNorm(False, **fields)
    stats = layer.init(KEY, X)["batch_stats"]
    stats["steps"] = stats["steps"].astype(dtype)

    def step(stats, _):
        variables = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}, "batch_stats": stats}
        _, updates = layer.apply(variables, X, mutable=["batch_stats"])
        stats = updates["batch_stats"]
        return (jax.lax.pmean(stats, "i") if dtype == jnp.float32 else stats), None

    def train(stats):
        return jax.lax.scan(step, stats, length=4)[0]

    stats = jax.vmap(train, axis_name="i")(jax.tree.map(lambda p: jnp.stack([p, p]), stats))
    assert stats["steps"].dtype == dtype
    assert stats["steps"].tolist() == [4, 4]


# Missing in training.


@both
@pytest.mark.parametrize("fields", [COUNTS["debias"], COUNTS["momentum=None"]], ids=str)
@pytest.mark.parametrize("stats", [TRAINED, TRAINED | {"steps": jnp.array(0)}], ids=["", "zero"])
def test_a_warning_before_trained_statistics_are_replaced(make, fields, stats):
    layer = make(stats, **fields)
    with pytest.warns(UserWarning, match=f"^{re.escape(SAID)}$") as caught:
        layer.train(X)
    assert [w.filename for w in caught] == [__file__]
    assert layer.stats["steps"] == 1
    np.testing.assert_allclose(layer.stats["mean"], X.mean(0), rtol=1e-5)
    layer.train(X)  # counts now
    assert layer.stats["steps"] == 2


def test_a_warning_in_compiled_programs():
    layer = bnjax.linen.BatchNorm(False, momentum=None)
    params = layer.init(KEY, X)["params"]

    @jax.jit
    def train(stats):
        return layer.apply({"params": params, "batch_stats": stats}, X, mutable=["batch_stats"])

    unseen = SAID.replace("are trained", "may be trained")
    with pytest.warns(UserWarning, match=f"^{re.escape(unseen)}$"):
        train(TRAINED)
    train(TRAINED | {"steps": jnp.array(5)})


def test_debias_set_afterwards_counts_from_then_on():
    layer = bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    layer(X)
    layer.set_attributes(debias=True)
    with pytest.warns(UserWarning, match="^Steps are 0 or missing"):
        layer(X)
    assert layer.steps[...] == 1


class Twice(nn.Module):
    """Called twice while initializing, too."""

    @nn.compact
    def __call__(self, x):
        norm = bnjax.linen.BatchNorm(False, debias=True)
        return norm(norm(x))


@both
@every_count
def test_no_warning_where_nothing_is_lost(make, fields):
    """Fresh statistics, with steps or not; known steps; and other averages."""
    start = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    for stats in (start, start | {"steps": jnp.array(0)}, TRAINED | {"steps": jnp.array(2)}):
        make(stats, **fields).train(X)
    make(TRAINED, momentum=COUNTS["momentum schedule"]["momentum"]).train(X)


def test_no_warning_while_initializing_or_without_any_statistics():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(Twice().init)(KEY, X)
        variables = Twice().init(KEY, X)
        Twice().apply(variables, X, mutable=["batch_stats"])
        apply = jax.jit(lambda params: Twice().apply(params, X, mutable=["batch_stats"]))
        _, updates = apply({"params": variables["params"]})
    assert updates["batch_stats"]["BatchNorm_0"]["steps"] == 2
