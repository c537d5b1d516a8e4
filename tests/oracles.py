"""The equations in float64 NumPy, as they stand in the README; slow and plain on purpose."""

import numpy as np

FLOAT32_MAX = float(np.finfo("float32").max)


def norms(x, axis=None, keepdims=False):
    """L2 norms; infinite where float32 does not hold the square, and a clip leaves nothing then."""
    squares = np.sum(np.square(x), axis=axis, keepdims=keepdims)
    return np.where(squares > FLOAT32_MAX, np.inf, np.sqrt(squares))


def clip(g, limit):
    return np.clip(g, -limit, limit)


def rescale(mode, g, clipped, factor=None):
    if mode is None:
        return clipped
    if mode == "alpha":
        return clipped * factor
    size = norms if mode == "norm" else lambda x: np.abs(x).max(initial=0.0)
    before, after = size(g), size(clipped)
    if after == 0:
        return np.zeros_like(clipped)
    return clipped * (before / after if np.isfinite(before) else 1.0)


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
    sizes = {s: norms(np.sqrt(total)) for s, total in totals.items()}
    return [
        g * min(1.0, max_norm / sizes[s]) if sizes[s] > 0 else g
        for g, s in zip(grads, scopes, strict=True)
    ]


def update_ratio(grads, weights, axes, groups, max_ratio, rate, eps=1e-3):
    """`axes`: one a gradient, None for what is left alone; those of one group share a norm."""

    def norm(arrays, group, i):
        if group is None:
            return norms(arrays[i], axes[i], keepdims=True)
        members = [a for a, g, x in zip(arrays, groups, axes, strict=True) if g == group and x]
        return norms(np.sqrt(sum(np.sum(np.square(a)) for a in members)))

    result = []
    for i, (g, group) in enumerate(zip(grads, groups, strict=True)):
        if axes[i] is None:
            result.append(g)
            continue
        limit = max_ratio * np.maximum(norm(weights, group, i), eps) / rate
        size = norm(grads, group, i)
        result.append(g * np.minimum(1.0, limit / np.where(size > 0, size, np.inf)))
    return result


def bounded_biases(grads, weights, owners, max_ratio, rate, eps=1e-3):
    """`owners`: for each bias the kernel of its units, which are the last axis; None: no bias."""
    result = []
    for g, owner in zip(grads, owners, strict=True):
        if owner is not None:
            rows = weights[owner].reshape(-1, weights[owner].shape[-1])
            limit = max_ratio * np.maximum(np.sqrt(np.sum(rows**2, axis=0)), eps) / rate
            g = np.clip(g, -limit, limit)
        result.append(g)
    return result


def agc(g, w, axes, factor, eps=1e-3):
    """Equation 3 of arXiv 2102.06171, unit by unit."""
    g_norm = norms(g, axes, keepdims=True)
    limit = factor * np.maximum(np.sqrt(np.sum(w**2, axis=axes, keepdims=True)), eps)
    return np.where(g_norm > limit, g * limit / np.where(g_norm > 0, g_norm, 1.0), g)


def rms_clip(g, threshold):
    return g / max(1.0, norms(g) / np.sqrt(g.size) / threshold)


class PercentileOracle:
    def __init__(self, percentile, window):
        self.percentile, self.window, self.history = percentile, window, {}

    def __call__(self, norms):
        limits = {}
        for s, n in norms.items():
            past = self.history.setdefault(s, [])
            if n > 0:
                past.append(n)
            limits[s] = np.percentile(past[-self.window :], self.percentile) if past else np.inf
        return limits


class ZScoreOracle:
    """The reference code of arXiv 2504.02507, mode "zscore", without its bound of 1.

    Except that a norm of 0 is not remembered, and that the deviation is at least 0.1 of the mean.
    """

    def __init__(self, threshold, alpha, warmup, option, eps=1e-6):
        self.threshold, self.alpha, self.warmup = threshold, alpha, warmup
        self.option, self.eps = option, eps
        self.buffer, self.moments = {}, {}

    def __call__(self, norms):
        limits = {}
        for s, n in norms.items():
            limits[s] = np.inf
            if n == 0:
                continue
            if s not in self.moments:
                buffer = self.buffer.setdefault(s, [])
                buffer.append(n)
                if len(buffer) >= self.warmup:
                    self.moments[s] = (np.mean(buffer), np.var(buffer))
                continue
            mean, var = self.moments[s]
            deviation = max(np.sqrt(var), 0.1 * mean)
            z = (n - mean) / (deviation + self.eps)
            if z > self.threshold:
                eta = z / self.threshold
                adaptive = mean + self.threshold * deviation / eta
                n = limits[s] = mean if self.option == "mean" else adaptive
            mean = self.alpha * mean + (1 - self.alpha) * n
            var = self.alpha * var + (1 - self.alpha) * (n - mean) ** 2
            self.moments[s] = (mean, var)
        return limits


class AdaOracle:
    """Algorithm 1 of arXiv 2502.11034, except that a norm of 0 is not remembered."""

    def __init__(self, rel, absolute, beta, warmup):
        self.rel, self.abs, self.beta, self.warmup = rel, absolute, beta, warmup
        self.gamma, self.step = {}, 0

    def __call__(self, norms):
        limits = {}
        total = np.sqrt(sum(n**2 for n in norms.values()))
        for s, n in norms.items():
            known = self.gamma.get(s, np.inf)
            if self.step < self.warmup:
                limits[s] = n * min(1.0, self.abs / max(total, 1e-30))
                new = min(known, limits[s])
            else:
                limits[s] = min(n, self.rel * known)
                new = self.beta * known + (1 - self.beta) * limits[s]
                new = limits[s] if known == np.inf else new
            if n > 0:
                self.gamma[s] = new
        self.step += 1
        return limits
