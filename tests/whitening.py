"""The oracle of whitening: covariances and their inverse roots, in NumPy's double precision."""

import numpy as np

METHODS = {
    "cholesky": {"method": "cholesky"},
    "newton_schulz": {"method": "newton_schulz", "iterations": 40},
}


def correlated(rows, size, condition=10.0, groups=1, seed=0):
    """Normal data whose covariance in each group has exactly this condition number, mean 0."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(groups):
        z = rng.standard_normal((rows, size))
        z -= z.mean(0)
        z = z @ np.linalg.inv(np.linalg.cholesky(z.T @ z / rows)).T
        q, _ = np.linalg.qr(rng.standard_normal((size, size)))
        parts.append(z * np.sqrt(np.geomspace(1, 1 / condition, size)) @ q.T)
    return np.concatenate(parts, 1)


def in_groups(x, size):
    """[N, C] as [groups, N, size], in double precision."""
    x = np.asarray(x)
    x = x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)
    return np.moveaxis(x.reshape(len(x), -1, size), 0, 1)


def covariance(x, size, weights=None):
    """The oracle: biased, in each group of neighbouring columns."""
    x = in_groups(x, size)
    w = np.ones(x.shape[1]) if weights is None else np.asarray(weights, np.float64)
    d = x - (w[:, None] * x).sum(1, keepdims=True) / w.sum()
    return np.einsum("n,gni,gnj->gij", w, d, d.conj()) / w.sum()


def transform(cov, method, epsilon):
    """The oracle: the inverse Cholesky factor, or by eigenvalues the inverse square root."""
    a = cov + epsilon * np.eye(cov.shape[-1])
    if method == "cholesky":
        return np.linalg.inv(np.linalg.cholesky(a))
    values, vectors = np.linalg.eigh(a)
    return vectors / np.sqrt(values)[:, None] @ np.swapaxes(vectors, 1, 2).conj()


def whitened(x, size, method, epsilon=1e-5, scale=1.0, bias=0.0):
    """The oracle of the output."""
    d = in_groups(x, size)
    d = d - d.mean(1, keepdims=True)
    w = transform(covariance(x, size), method, epsilon)
    return np.moveaxis(d @ np.swapaxes(w, 1, 2), 0, 1).reshape(np.shape(x)) * scale + bias


def assert_covariances(m, x, size, weights=None, tolerance=2e-6):
    """The moments, in units of the standard deviations."""
    x = np.asarray(x, np.longdouble)
    w = np.ones(len(x)) if weights is None else weights
    mean = (w[:, None] * x).sum(0) / w.sum()
    mean = mean + (w[:, None] * (x - mean)).sum(0) / w.sum()
    expected = covariance(x - mean, size, weights)
    deviations = np.sqrt(np.diagonal(expected, axis1=1, axis2=2))
    error = np.asarray(m.mean, np.longdouble) + np.asarray(m.remainder, np.longdouble) - mean
    assert np.max(np.abs(error) / deviations.ravel()) < tolerance
    error = np.abs(m.cov - expected) / deviations[:, :, None] / deviations[:, None]
    assert error.max() < tolerance
    np.testing.assert_allclose(m.count, w.sum(), rtol=1e-6)
