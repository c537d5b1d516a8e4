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
