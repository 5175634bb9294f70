"""The oracle: batch normalization as the textbook's formula, in NumPy's longdouble.

It measures twice over (first the mean, then the deviations from it) and knows no JAX. Weights
are 1 without `where`. A masked-out value that is NaN or infinite counts as absent altogether:
its output is the bias, and it has no gradient. A feature of weight zero has mean 0, variance 1.
"""

from typing import NamedTuple

import numpy as np


class Reference(NamedTuple):
    """Statistics `[*features]`."""

    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray


class Gradient(NamedTuple):
    """Derivatives of sum(dy * y) with respect to x, scale and bias."""

    x: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


def wide(a):
    """The same numbers in the widest floating dtype, complex if they were."""
    a = np.asarray(a)
    return a.astype(np.clongdouble if np.iscomplexobj(a) else np.longdouble)


def features_of(ndim, feature_axis):
    """The feature axes and the others, both ascending."""
    axes = np.atleast_1d(feature_axis) % ndim
    return tuple(sorted(axes.tolist())), tuple(i for i in range(ndim) if i not in axes)


def spread(p, shape, feature_axis):
    """A per-feature array with the rank of x; one of that rank already stays as it is."""
    features, _ = features_of(len(shape), feature_axis)
    p = wide(p)
    if p.shape != tuple(shape[i] for i in features):
        return p
    return p.reshape([n if i in features else 1 for i, n in enumerate(shape)])


def weigh(x, where):
    """x without absent values, its weights, and which values are absent."""
    x = wide(x)
    w = np.ones(x.shape) if where is None else np.broadcast_to(np.asarray(where), x.shape)
    w = wide(w.astype(bool) if w.dtype.kind in "biu" else w)
    absent = (w == 0) & ~np.isfinite(x)
    return np.where(absent, 0, x), w, absent


def average(x, w, reduced):
    """The weighted mean, 0 without any weight; rank kept."""
    n = w.sum(reduced, keepdims=True)
    return (w * x).sum(reduced, keepdims=True) / np.where(n == 0, 1, n)


def center(x, w, reduced):
    """x minus its mean, and minus the mean of that: longdouble rounds a large mean, too."""
    d = x - average(x, w, reduced)
    return d - average(d, w, reduced)


def moments(x, *, feature_axis=-1, where=None):
    """Weighted mean, biased variance, and sum of the weights over all axes but the features'."""
    x, w, _ = weigh(x, where)
    _, reduced = features_of(x.ndim, feature_axis)
    mean = average(x, w, reduced)
    mean = mean + average(x - mean, w, reduced)
    count = w.sum(reduced, keepdims=True)
    var = np.where(count == 0, 1, average(np.abs(center(x, w, reduced)) ** 2, w, reduced))
    return Reference(*(a.squeeze(reduced) for a in (mean, var, count)))


def merge(parts, *, feature_axis=-1):
    """The moments of batches together: those of their concatenation."""
    first = np.asarray(parts[0])
    _, reduced = features_of(first.ndim, feature_axis)
    return moments(np.concatenate([wide(p) for p in parts], reduced[0]), feature_axis=feature_axis)


def normalize(x, mean, var, scale=1.0, bias=0.0, *, feature_axis=-1, epsilon=1e-5):
    """(x - mean) / sqrt(var + epsilon) * scale + bias, with given statistics."""
    x = wide(x)
    mean, var, scale, bias = (spread(p, x.shape, feature_axis) for p in (mean, var, scale, bias))
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias


def standardize(x, *, feature_axis=-1, where=None, epsilon=1e-5):
    """x_hat = (x - mean) r and r = 1 / sqrt(var + epsilon), with the batch's own statistics."""
    var = moments(x, feature_axis=feature_axis, where=where).var
    r = 1 / np.sqrt(spread(var, np.shape(x), feature_axis) + wide(epsilon))
    x, w, absent = weigh(x, where)
    d = center(x, w, features_of(x.ndim, feature_axis)[1])
    return np.where(absent, 0, d * r), r


def batch_norm(x, scale=1.0, bias=0.0, *, feature_axis=-1, where=None, epsilon=1e-5):
    """Training: the output x_hat * scale + bias."""
    x_hat, _ = standardize(x, feature_axis=feature_axis, where=where, epsilon=epsilon)
    scale, bias = (spread(p, x_hat.shape, feature_axis) for p in (scale, bias))
    return x_hat * scale + bias


def gradient(x, dy, scale=1.0, *, feature_axis=-1, where=None, epsilon=1e-5):
    """Back through training, mean and variance included (real x, per-feature scale).

    With g = dy * scale:  dx = r (g - w / n (sum(g) + x_hat sum(g x_hat)))
    """
    x_hat, r = standardize(x, feature_axis=feature_axis, where=where, epsilon=epsilon)
    _, w, absent = weigh(x, where)
    _, reduced = features_of(x_hat.ndim, feature_axis)
    n = w.sum(reduced, keepdims=True)
    dy = wide(dy)
    g = np.where(absent, 0, dy * spread(scale, x_hat.shape, feature_axis))
    through = g.sum(reduced, keepdims=True) + x_hat * (g * x_hat).sum(reduced, keepdims=True)
    dx = r * (g - w / np.where(n == 0, 1, n) * through)
    return Gradient(dx, (dy * x_hat).sum(reduced), dy.sum(reduced))


def whiten(x, dy, size, *, where=None, epsilon=1e-5):
    """Columns in groups whitened by the inverse Cholesky factor, and the gradient of sum(dy * y).

    With p = w / n, d = x - mean, A = sum(p d d') + epsilon = L L' and W = L^-1: y = W d. Back
    through W (Murray, 2016), with V = -W' (sum dy d') W' and tril halving the diagonal:

      dd = W' dy + 2 p S d,  S = sym(W' tril(L' V) W),  dx = dd - p sum(dd)
    """
    x, w, _ = weigh(x, where)
    p = (w / w.sum(0))[:, :1].astype(np.float64)
    d, dy = center(x, w, (0,)).astype(np.float64), np.asarray(dy, np.float64)
    y, dx = np.empty_like(d), np.empty_like(d)
    for start in range(0, d.shape[1], size):
        group = slice(start, start + size)
        of, g = d[:, group], dy[:, group]
        lower = np.linalg.cholesky((p * of).T @ of + epsilon * np.eye(size))
        inverse = np.linalg.inv(lower)
        y[:, group] = of @ inverse.T
        through = lower.T @ np.tril(-inverse.T @ (g.T @ of) @ inverse.T)
        through = np.tril(through) - np.diag(np.diag(through)) / 2
        through = inverse.T @ through @ inverse
        back = g @ inverse + p * (of @ (through + through.T))
        dx[:, group] = back - p * back.sum(0)
    return y, dx
