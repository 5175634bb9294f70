"""Programs exported for a batch of any size, and for every platform in one.

A free size is a number that cannot be compared: no branch may depend on it.
"""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from samples import normal

import bnjax
import bnjax.linen
import bnjax.nnx

RUNNING = bnjax.Moments(np.full(4, 0.1, np.float32), np.full(4, 1.1, np.float32))
MASK = np.arange(4) < 3


def of_functions(measure, apply=bnjax.normalize, **settings):
    def step(x):
        m = measure(x, **settings)
        return apply(x, m), m

    return step


def gradient(step):
    return lambda x: jax.grad(lambda x: jnp.sum(step(x)[0] ** 3))(x)


def linen(kind, **fields):
    layer = getattr(bnjax.linen, kind)(**{"use_running_average": False} | fields)

    def step(x):
        variables = layer.init(jax.random.key(0), jnp.zeros((2,) * (x.ndim - 1) + (4,)))
        return layer.apply(variables, x, mutable=["batch_stats", "moments"])

    return step


def nnx_layer(kind, **fields):
    def step(x):
        layer = getattr(bnjax.nnx, kind)(4, rngs=nnx.Rngs(0), **fields)
        y = layer(x)
        return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    return step


cov_moments = functools.partial(of_functions, bnjax.cov_moments)
PROGRAMS = {
    "feature mask": of_functions(bnjax.moments, where=MASK),
    "pivot": of_functions(bnjax.moments, pivot=RUNNING.mean),
    "batch_norm": bnjax.batch_norm,
    "batch_renorm": lambda x: bnjax.batch_renorm(x, RUNNING, r_max=3.0, d_max=5.0),
    "cov_moments by groups": of_functions(bnjax.cov_moments, group_size=2),
    "cholesky": cov_moments(functools.partial(bnjax.whiten, method="cholesky")),
    "newton_schulz": cov_moments(functools.partial(bnjax.whiten, method="newton_schulz")),
    "merge": lambda x: bnjax.merge(bnjax.moments(x), RUNNING._replace(count=8.0)),
    "ema": lambda x: bnjax.ema(RUNNING, bnjax.moments(x), momentum=0.9, ddof=1),
    "merge_stacked": lambda x: bnjax.merge_stacked(jax.vmap(bnjax.moments)(x[:, None])),
    "gradient": gradient(bnjax.batch_norm),
    "gradient, whitened": gradient(cov_moments(bnjax.whiten)),
}
PROGRAMS |= {
    "linen BatchNorm": linen("BatchNorm"),
    "linen, running pivot": linen("BatchNorm", pivot="running"),
    "linen, evaluation": linen("BatchNorm", use_running_average=True),
    "linen, adapting": linen("BatchNorm", use_running_average=True, eval_momentum=0.5),
    "linen, finite only": linen("BatchNorm", skip_nonfinite=True),
    "linen BatchRenorm": linen("BatchRenorm"),
    "linen DecorrelatedBatchNorm": linen("DecorrelatedBatchNorm", group_size=2),
    "nnx, gradient": gradient(nnx_layer("BatchNorm")),  # in NNX the layers are the same programs
    "nnx DecorrelatedBatchNorm": nnx_layer("DecorrelatedBatchNorm", group_size=2),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_batch_of_any_size_on_any_platform(name):
    f = PROGRAMS[name]
    free = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 3, h, 4"), jnp.float32)
    exported = jax.export.export(jax.jit(f), platforms=["cpu", "cuda", "tpu"])(free)
    x = normal((6, 3, 5, 4), ratio=3)
    chex.assert_trees_all_close(exported.call(x), f(x), rtol=1e-5, atol=2e-6)
