"""Scale and bias that depend on the example: by class, by a conditioning network, by position."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import bnjax
import bnjax.linen

CLASSES, FEATURES = 4, 3


def data(seed=0):
    """Images, the gradient of the output, their classes, and scales and biases by class."""
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, 10, 5, 5, FEATURES)).astype(np.float32)
    labels = np.r_[:CLASSES, rng.integers(0, CLASSES - 1, 6)]
    scales, biases = rng.standard_normal((2, CLASSES, FEATURES)).astype(np.float32)
    return x + 2, dy, labels, scales + 1, biases


def by_class(x, labels, scales, biases, **settings):
    """Conditional batch normalization (de Vries et al., 2017; Dumoulin et al., 2017)."""
    scale, bias = scales[labels][:, None, None, :], biases[labels][:, None, None, :]
    return bnjax.batch_norm(x, scale, bias, **settings)


def test_each_example_has_the_scale_and_bias_of_its_class():
    x, dy, labels, scales, biases = data()
    y, pull, m = jax.vjp(
        lambda x, s, b: by_class(x, labels, s, b),
        x, jnp.asarray(scales), jnp.asarray(biases), has_aux=True,
    )  # fmt: skip
    x_hat, _ = reference.standardize(x)
    for k in range(CLASSES):
        of_k = x_hat[labels == k] * scales[k] + biases[k]
        np.testing.assert_allclose(y[labels == k], of_k.astype(np.float32), atol=1e-5)
    whole = reference.moments(x)
    np.testing.assert_allclose(m.mean, whole.mean.astype(np.float32), atol=1e-6)
    np.testing.assert_allclose(m.var, whole.var.astype(np.float32), rtol=1e-5)

    dx, dscales, dbiases = pull(dy)
    g = dy * scales[labels][:, None, None, :]
    expected = reference.gradient(x, g).x
    np.testing.assert_allclose(dx, expected.astype(np.float32), atol=1e-5)
    for k in range(CLASSES):
        of_k = labels == k
        dscale = np.sum(dy[of_k] * x_hat[of_k], (0, 1, 2)).astype(np.float32)
        np.testing.assert_allclose(dscales[k], dscale, atol=1e-4)
        np.testing.assert_allclose(dbiases[k], np.sum(dy[of_k], (0, 1, 2)), atol=1e-4)


def test_a_class_that_is_absent_gets_no_gradient():
    x, dy, _, scales, biases = data()
    labels = np.zeros(10, int)

    def loss(scales, biases):
        return jnp.sum(dy * by_class(x, labels, scales, biases)[0])

    for grad in jax.grad(loss, argnums=(0, 1))(jnp.asarray(scales), jnp.asarray(biases)):
        assert jnp.all(grad[0] != 0)
        assert jnp.all(grad[1:] == 0)


def test_the_same_class_everywhere_is_the_plain_layer():
    x, _, _, scales, biases = data()
    y, m = by_class(x, np.ones(10, int), scales, biases)
    chex.assert_trees_all_close((y, m), bnjax.batch_norm(x, scales[1], biases[1]), atol=1e-6)


def test_by_class_at_inference_and_with_renormalization():
    x, _, labels, scales, biases = data()
    running = bnjax.Moments(np.full(FEATURES, 1.5, np.float32), np.full(FEATURES, 2, np.float32))
    scale, bias = scales[labels][:, None, None, :], biases[labels][:, None, None, :]
    y = bnjax.normalize(x, running, scale, bias)
    x_hat = reference.normalize(x, running.mean, running.var)
    np.testing.assert_allclose(y, (x_hat * scale + bias).astype(np.float32), atol=1e-5)
    renormed, _ = bnjax.batch_renorm(x, running, scale, bias, r_max=np.inf, d_max=np.inf)
    np.testing.assert_allclose(renormed, y, atol=1e-5)


def test_a_network_gives_scale_and_bias_to_each_example():
    """FiLM (Perez et al., 2018): gradients reach what the examples are conditioned on."""
    x, dy, _, _, _ = data()
    condition = np.random.default_rng(1).standard_normal((10, 2)).astype(np.float32)
    weights = np.random.default_rng(2).standard_normal((2, 2, FEATURES)).astype(np.float32)

    def film(condition):
        scale, bias = (jnp.matmul(condition, w)[:, None, None, :] for w in weights)
        return jnp.sum(dy * bnjax.batch_norm(x, 1 + scale, bias)[0])

    x_hat, _ = reference.standardize(x)
    expected = np.einsum("nhwc,dc->nd", dy * x_hat, weights[0], optimize=True)
    expected += np.einsum("nhwc,dc->nd", dy, weights[1])
    np.testing.assert_allclose(jax.grad(film)(condition), expected.astype(np.float32), atol=1e-3)


@pytest.mark.parametrize("channels", [1, FEATURES])
def test_a_map_gives_scale_and_bias_to_each_position(channels):
    """SPADE (Park et al., 2019)."""
    x, dy, _, _, _ = data()
    shape = (2, 10, 5, 5, channels)
    scale, bias = np.random.default_rng(1).standard_normal(shape).astype(np.float32)

    def loss(x, scale, bias):
        return jnp.sum(dy * bnjax.batch_norm(x, scale, bias)[0])

    y, _ = bnjax.batch_norm(x, scale, bias)
    np.testing.assert_allclose(
        y, reference.batch_norm(x, scale, bias).astype(np.float32), atol=1e-5
    )
    dx, dscale, dbias = jax.grad(loss, argnums=(0, 1, 2))(x, scale, bias)
    x_hat, _ = reference.standardize(x)
    kept = (lambda a: a) if channels > 1 else (lambda a: a.sum(-1, keepdims=True))
    np.testing.assert_allclose(dscale, kept(dy * x_hat).astype(np.float32), atol=1e-5)
    np.testing.assert_allclose(dbias, kept(dy), atol=1e-5)
    expected = reference.gradient(x, dy * scale).x
    np.testing.assert_allclose(dx, expected.astype(np.float32), atol=1e-5)


def test_a_scale_by_class_keeps_the_input_once():
    """And the scales, of which each example has one vector: no second image."""
    x, _, labels, scales, biases = data()
    x = jnp.asarray(np.tile(x, (1, 8, 8, 1)))
    scale, bias = (jnp.asarray(p[labels][:, None, None, :]) for p in (scales, biases))
    f = jax.jit(lambda x, scale, bias: bnjax.batch_norm(x, scale, bias)[0])
    _, backward = jax.vjp(f, x, scale, bias)
    buffers = {a.unsafe_buffer_pointer(): a.nbytes for a in jax.tree.leaves(backward)}
    assert sum(buffers.values()) <= x.nbytes + 2 * scale.nbytes + 16 * 4 * FEATURES


class ConditionalNorm(nn.Module):
    """The layer without parameters of its own, and an embedding of the class for each."""

    @nn.compact
    def __call__(self, x, labels, train):
        x = bnjax.linen.BatchNorm(use_scale=False, use_bias=False)(x, not train)
        ones = nn.initializers.ones
        scale = nn.Embed(CLASSES, x.shape[-1], embedding_init=ones, name="scale")(labels)
        bias = nn.Embed(CLASSES, x.shape[-1], embedding_init=nn.initializers.zeros, name="bias")(
            labels
        )
        return x * scale[:, None, None, :] + bias[:, None, None, :]


def test_a_layer_by_class_learns_what_the_class_asks_for():
    """The same images are asked for with another contrast and brightness by class."""
    x, _, labels, scales, biases = data()
    x_hat, _ = reference.standardize(x)
    target = np.float32(x_hat * scales[labels][:, None, None] + biases[labels][:, None, None])
    layer = ConditionalNorm()
    variables = layer.init(jax.random.key(0), x, labels, False)
    optimizer = optax.sgd(3.0)

    def step(carry, _):
        params, stats, state = carry

        def loss(params):
            y, updates = layer.apply(
                {"params": params, "batch_stats": stats}, x, labels, True, mutable=["batch_stats"]
            )
            return jnp.mean((y - target) ** 2), updates["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), stats, state), value

    params = variables["params"]
    carry = params, variables["batch_stats"], optimizer.init(params)
    (params, _, _), losses = jax.lax.scan(step, carry, length=150)
    assert losses[-1] < 1e-3 < losses[0]
    np.testing.assert_allclose(params["scale"]["embedding"], scales, atol=0.05)
    np.testing.assert_allclose(params["bias"]["embedding"], biases, atol=0.05)
