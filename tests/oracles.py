"""The equations in float64 NumPy, as they stand in the README; slow and plain on purpose."""

import numpy as np


def clip(g, limit):
    return np.clip(g, -limit, limit)


def rescale(mode, g, clipped, factor=None):
    if mode is None:
        return clipped
    if mode == "alpha":
        return clipped * factor
    size = np.linalg.norm if mode == "norm" else lambda x: np.abs(x).max(initial=0.0)
    before, after = size(g.ravel()), size(clipped.ravel())
    return clipped * (before / after) if after > 0 else np.zeros_like(clipped)


def absolute(g, w, threshold, mode=None):
    return rescale(mode, g, clip(g, threshold))


def exponential(g, w, beta, gamma, weight, mode=None):
    weight = {
        "elementwise": lambda: w,
        "rms": lambda: np.sqrt(np.mean(np.square(w))),
        "none": lambda: 1.0,
    }[weight]()
    factor = np.exp(beta * weight)
    return rescale(mode, g, clip(g, gamma * factor), factor)


def norm(grads, scopes, max_norm):
    """`scopes`: one hashable a gradient; gradients of one scope share a norm."""
    totals = {}
    for g, s in zip(grads, scopes, strict=True):
        totals[s] = totals.get(s, 0.0) + np.sum(np.square(g))
    return [
        g * min(1.0, max_norm / np.sqrt(totals[s])) if totals[s] > 0 else g
        for g, s in zip(grads, scopes, strict=True)
    ]


def update_ratio(grads, weights, axes, groups, max_ratio, rate, eps=1e-3):
    """`axes`: one a gradient, None for what is left alone; those of one group share a norm."""

    def norm(arrays, group, i):
        if group is None:
            return np.sqrt(np.sum(np.square(arrays[i]), axis=axes[i], keepdims=True))
        members = [a for a, g, x in zip(arrays, groups, axes, strict=True) if g == group and x]
        return np.sqrt(sum(np.sum(np.square(a)) for a in members))

    result = []
    for i, (g, group) in enumerate(zip(grads, groups, strict=True)):
        if axes[i] is None:
            result.append(g)
            continue
        limit = max_ratio * np.maximum(norm(weights, group, i), eps) / rate
        size = norm(grads, group, i)
        result.append(g * np.minimum(1.0, limit / np.where(size > 0, size, np.inf)))
    return result
