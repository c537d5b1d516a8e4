"""Clippers and a whole update in float64 NumPy, slow and simple: the oracles of the tests.

A clipper is its limit L. Element by element g' = clip(g, −L, L); over any other scope
g' = g·min(1, L/‖g‖), where all gradients of a scope share ‖g‖.

An update: add up micro-batches → sum over replicas → (merge sparse rows) → unscale → skip if not
finite or a spike, and lower the loss scale → clip → SGD or Adam (→ clip the weight update, if the
clipper limits it).
"""

import dataclasses
import re
import types

import numpy as np

import keras_gradclip as kgc
from keras_gradclip.clippers.units import default_unit_axes

FLOAT32_MAX = float(np.finfo("float32").max)

# Clippers -----------------------------------------------------------------------------------------

#: Functions of (clipper, live hyper-parameters, weight): the limit. A weight has `values` of one
#: variable, and the `norm` and `size` of what the scope holds.
LIMITS = {
    kgc.AbsoluteClip: lambda c, h, w: h["threshold"],
    kgc.ExponentialClip: lambda c, h, w: h["gamma"] * exponential_factor(c, h, w),
    kgc.NormClip: lambda c, h, w: h["max_norm"],
    kgc.RMSClip: lambda c, h, w: h["threshold"] * np.sqrt(w.size),
    kgc.AdaptiveClip: lambda c, h, w: h["clip_factor"] * np.maximum(w.norm, c.eps),
    kgc.UpdateRatioClip: lambda c, h, w: h["max_ratio"] * np.maximum(w.norm, c.eps) / h["rate"],
}


def exponential_factor(clipper, hyper, w):
    weight = {"elementwise": w.values, "rms": np.sqrt(np.mean(w.values**2)), "none": 1.0}
    return np.exp(hyper["beta"] * weight[clipper.weight])


class Percentile:
    """The limits of the norms so far, by scope; a norm of 0 is not remembered."""

    def __init__(self):
        self.history = {}

    def __call__(self, clipper, hyper, norms):
        limits = {}
        for s, n in norms.items():
            past = self.history.setdefault(s, [])
            past += [n] if n > 0 else []
            last = past[-clipper.window :]
            limits[s] = np.percentile(last, hyper["percentile"]) if last else np.inf
        return limits


class ZScore:
    """The reference code of arXiv 2504.02507, mode "zscore", without its bound of 1.

    Except that a norm of 0 is not remembered, and that the deviation is at least 0.1 of the mean.
    """

    def __init__(self):
        self.buffer, self.moments = {}, {}

    def __call__(self, clipper, hyper, norms):
        limits, threshold = {}, hyper["z_threshold"]
        for s, n in norms.items():
            limits[s] = np.inf
            if n == 0:
                continue
            if s not in self.moments:
                buffer = self.buffer.setdefault(s, [])
                buffer.append(n)
                if len(buffer) >= clipper.warmup_steps:
                    self.moments[s] = (np.mean(buffer), np.var(buffer))
                continue
            mean, var = self.moments[s]
            deviation = max(np.sqrt(var), 0.1 * mean)
            z = (n - mean) / (deviation + clipper.eps)
            if z > threshold:
                adaptive = mean + threshold * deviation / (z / threshold)
                n = limits[s] = mean if clipper.option == "mean" else adaptive
            mean = clipper.alpha * mean + (1 - clipper.alpha) * n
            var = clipper.alpha * var + (1 - clipper.alpha) * (n - mean) ** 2
            self.moments[s] = (mean, var)
        return limits


class Ada:
    """Algorithm 1 of arXiv 2502.11034, except that a norm of 0 is not remembered."""

    def __init__(self):
        self.gamma, self.step = {}, 0

    def __call__(self, clipper, hyper, norms):
        limits = {}
        total = np.sqrt(sum(n**2 for n in norms.values()))
        for s, n in norms.items():
            known = self.gamma.get(s, np.inf)
            if self.step < clipper.warmup_steps:
                limits[s] = n * min(1.0, hyper["lambda_abs"] / max(total, 1e-30))
                new = min(known, limits[s])
            else:
                limits[s] = min(n, hyper["lambda_rel"] * known)
                new = clipper.beta * known + (1 - clipper.beta) * limits[s]
                new = limits[s] if known == np.inf else new
            if n > 0:
                self.gamma[s] = new
        self.step += 1
        return limits


MEMORIES = {kgc.PercentileClip: Percentile, kgc.ZScoreClip: ZScore, kgc.AdaClip: Ada}


def norms(arrays, scopes):
    """For each array the norm over its scope, for a unit's axes one a unit.

    Infinite where float32 does not hold the square, and a clip leaves nothing then.
    """
    totals = {}
    for a, (key, axes) in zip(arrays, scopes, strict=True):
        square = np.sum(np.square(a), axis=axes, keepdims=axes is not None)
        totals[key] = totals.get(key, 0.0) + square
    return [np.where(totals[k] > FLOAT32_MAX, np.inf, np.sqrt(totals[k])) for k, _ in scopes]


def layer_of(path):
    return path.rpartition("/")[0]


def unit_axes(path, shape):
    return default_unit_axes(types.SimpleNamespace(path=path, shape=shape))


def is_vector(path, shape):
    return len(shape) <= 1 or "bias" in path.rpartition("/")[2]


def scope_of(clipper, path, shape):
    """(What shares a norm with this variable, the axes of a unit); None: it is not clipped."""
    if isinstance(clipper, kgc.UpdateRatioClip) and is_vector(path, shape):
        return None
    return {
        "unit": (path, unit_axes(path, shape)),
        "variable": (path, None),
        "layer": (layer_of(path), None),
        "global": ("global", None),
    }[clipper.scope]


def rescaled(clipper, hyper, g, clipped, w):
    """The size of before ("norm", "max"), or the weight's factor ("alpha"), given back."""
    mode = getattr(clipper, "rescale", None)
    if mode is None:
        return clipped
    if mode == "alpha":
        return clipped * exponential_factor(clipper, hyper, w)
    before, after = (
        float(norms([x], [(0, None)])[0]) if mode == "norm" else np.abs(x).max(initial=0.0)
        for x in (g, clipped)
    )
    if after == 0:
        return np.zeros_like(clipped)
    return clipped * (before / after if np.isfinite(before) else 1.0)


def clip_elements(clipper, hyper, grads, weights):
    result = []
    for g, values in zip(grads, weights, strict=True):
        w = types.SimpleNamespace(values=values)
        limit = LIMITS[type(clipper)](clipper, hyper, w)
        result.append(rescaled(clipper, hyper, g, np.clip(g, -limit, limit), w))
    return result


def clip_scopes(clipper, hyper, grads, weights, paths, memory):
    scopes = [scope_of(clipper, p, g.shape) for p, g in zip(paths, grads, strict=True)]
    chosen = [i for i, s in enumerate(scopes) if s is not None]
    scopes = [scopes[i] for i in chosen]
    sizes = norms([grads[i] for i in chosen], scopes)
    if memory is None:
        of_weights = norms([weights[i] for i in chosen], scopes)
        limits = [
            LIMITS[type(clipper)](clipper, hyper, types.SimpleNamespace(norm=n, size=grads[i].size))
            for i, n in zip(chosen, of_weights, strict=True)
        ]
    else:
        usable = {k: n if np.isfinite(n) else 0.0 for (k, _), n in zip(scopes, sizes, strict=True)}
        by_scope = memory(clipper, hyper, {k: float(n) for k, n in usable.items()})
        limits = [by_scope[k] for k, _ in scopes]
    result = list(grads)
    for i, size, limit in zip(chosen, sizes, limits, strict=True):
        share = np.minimum(limit, FLOAT32_MAX) / np.where(size > 0, size, np.inf)
        factor = np.where(size > 0, np.minimum(1.0, share), 1.0)
        result[i] = rescaled(clipper, hyper, grads[i], grads[i] * factor, None)
    return result


def clip_biases(clipper, hyper, grads, paths, everything):
    """A bias by the last kernel of its layer that has as many units; `everything`: path to weight.

    Whether that kernel has a gradient of its own does not matter. A table has no bias.
    """
    result = []
    for g, path in zip(grads, paths, strict=True):
        of_units = None
        for other, weight in everything.items():
            is_kernel = not is_vector(other, weight.shape) and not other.endswith("/embeddings")
            if layer_of(other) == layer_of(path) and is_kernel:
                found = np.sqrt(np.sum(weight**2, axis=unit_axes(other, weight.shape)))
                of_units = found if found.size == g.size else of_units
        if is_vector(path, g.shape) and of_units is not None:
            w = types.SimpleNamespace(norm=of_units.reshape(g.shape))
            limit = LIMITS[type(clipper)](clipper, hyper, w)
            g = np.clip(g, -limit, limit)
        result.append(g)
    return result


def limits_updates(clipper):
    """Whether a clipper, or one inside it, limits weight updates."""
    if isinstance(clipper, kgc.Chain):
        return any(map(limits_updates, clipper.clippers))
    if isinstance(clipper, kgc.ClipMap):
        return any(limits_updates(c) for c in (*dict(clipper.rules).values(), clipper.default))
    return clipper is not None and clipper.stage == "update"


class Clip:
    """The twin of one clipper, also of a nested one; called as a clipper is.

    Args:
        clipper: the clipper, or None.
        rate: a function of the number of updates before.
        steps: where an update has two passes, whether this is the one over steps: those have the
            learning rate in them.

    Attributes:
        everything: path to weight, also of variables without a gradient, or of another rule.
    """

    def __init__(self, clipper, rate=lambda step: 1.0, steps=None):
        self.clipper, self.rate, self.steps = clipper, rate, steps
        self.largest_rate, self.everything = 0.0, None
        self.parts, self.memory = {}, MEMORIES.get(type(clipper), lambda: None)()
        if isinstance(clipper, kgc.Chain):
            self.parts = {i: Clip(c, rate, steps) for i, c in enumerate(clipper.clippers)}

    def __call__(self, grads, weights, paths, step=0):
        """Args: lists of gradients (no None), weights and paths; the number of updates before."""
        clipper, rate = self.clipper, self.rate(step)
        self.largest_rate = max(self.largest_rate, rate)
        everything = self.everything or dict(zip(paths, weights, strict=True))
        for part in self.parts.values():
            part.everything = everything
        if clipper is None or not grads:
            return grads
        if isinstance(clipper, kgc.Chain):
            for part in self.parts.values():
                grads = part(grads, weights, paths, step)
            return grads
        if isinstance(clipper, kgc.ClipMap):
            return self._by_rule(grads, weights, paths, step, everything)
        if self.steps is not None and self.steps != (clipper.stage == "update"):
            return grads
        hyper = {
            k: float(v(step)) if callable(v) else v for k, v in clipper.hyperparameters().items()
        }
        hyper["rate"] = self.largest_rate if getattr(clipper, "anneal", None) else rate
        hyper["rate"] /= rate if self.steps else 1.0
        if clipper.scope == "element":
            return clip_elements(clipper, hyper, grads, weights)
        clipped = clip_scopes(clipper, hyper, grads, weights, paths, self.memory)
        if clipper.biases == "unit":
            clipped = clip_biases(clipper, hyper, clipped, paths, everything)
        return clipped

    def change(self, factor):
        """Multiply the first threshold that is a number, as somebody may in mid-training."""
        known = {} if self.clipper is None else self.clipper.hyperparameters()
        key = next((k for k, v in known.items() if not callable(v)), None)
        if key is not None:
            self._set(self.clipper.with_hyperparameters({**known, key: factor * known[key]}))

    def forget_rate(self):
        """Somebody has set the learning rate, not a schedule: an annealed limit begins anew."""
        self.largest_rate = 0.0
        for part in self.parts.values():
            part.forget_rate()

    def _set(self, clipper):
        self.clipper = clipper
        if isinstance(clipper, kgc.Chain):
            inner = dict(enumerate(clipper.clippers))
        elif isinstance(clipper, kgc.ClipMap):
            inner = dict([*clipper.rules, (".*", clipper.default)])
        for key, part in self.parts.items():
            part._set(inner[key])

    def _by_rule(self, grads, weights, paths, step, everything):
        """The first rule that matches has a variable; its norms are over its own variables."""
        rules = [*self.clipper.rules, (".*", self.clipper.default)]
        rule_of = [next(r for r, _ in rules if re.fullmatch(r, path)) for path in paths]
        result = list(grads)
        for rule, clipper in rules:
            part = self.parts.setdefault(rule, Clip(clipper, self.rate, self.steps))
            part.everything = everything  # a bias's kernel may have another rule
            chosen = [i for i, name in enumerate(rule_of) if name == rule]
            lists = ([values[i] for i in chosen] for values in (grads, weights, paths))
            for i, g in zip(chosen, part(*lists, step), strict=True):
                result[i] = g
        return result


# One update ---------------------------------------------------------------------------------------


def dense(gradient, shape):
    """A float64 array of `shape`; a sparse gradient is a tuple (rows, values)."""
    if not isinstance(gradient, tuple):
        return np.asarray(gradient, "float64")
    result = np.zeros(shape)
    np.add.at(result, gradient[0], np.asarray(gradient[1], "float64"))
    return result


def sgd(weight, g, slot, step, learning_rate=0.1, momentum=0.9):
    slot["m"] = momentum * slot.get("m", 0.0) - learning_rate * g
    return weight + slot["m"]


def adam(weight, g, slot, step, learning_rate=0.1, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    slot["m"] = slot.get("m", 0.0) + (1 - beta_1) * (g - slot.get("m", 0.0))
    slot["v"] = slot.get("v", 0.0) + (1 - beta_2) * (g * g - slot.get("v", 0.0))
    alpha = learning_rate * np.sqrt(1 - beta_2**step) / (1 - beta_1**step)
    return weight - alpha * slot["m"] / (np.sqrt(slot["v"]) + epsilon)


@dataclasses.dataclass
class ReferenceUpdate:
    """An optimizer around float64 weights; `call` is one call of `apply` on every replica.

    Attributes:
        weights: list of float64 arrays, changed in place.
        paths: the path of each weight.
        clip: a function of (gradients, weights, paths, number of updates before), as `Clip` is.
        bound: the same, of the steps in the place of the gradients; or None.
        inner: `sgd` or `adam`.
        micro_steps: calls that make one update.
        skip: leave out an update that is not finite.
        scale: the loss scale that the gradients come with, or None.
        dynamic: skip what is not finite and adapt the scale.
        growth_steps: finite updates after which the scale doubles.
        spikes: (σ, window): leave out what stands out of the last norms; or None.
        is_close: a spike was so nearly none, or the reverse, that rounding decides.
    """

    weights: list
    paths: list
    clip: object
    bound: object = None
    inner: object = sgd
    micro_steps: int = 1
    skip: bool = False
    scale: float | None = None
    dynamic: bool = False
    growth_steps: int = 2000
    spikes: tuple | None = None
    is_close: bool = False

    def __post_init__(self):
        self.slots = [{} for _ in self.weights]
        self.sums = [None] * len(self.weights)
        self.norms = []
        self.calls = self.updates = self.skipped = self.finite_steps = 0

    def call(self, replicas):
        """Args: for each replica a list of gradients: array, (rows, values) or None."""
        self.calls += 1
        for grads in replicas:
            for i, g in enumerate(grads):
                if g is not None:
                    before = 0.0 if self.sums[i] is None else self.sums[i]
                    self.sums[i] = before + dense(g, self.weights[i].shape)
        if self.calls % self.micro_steps == 0:
            self._update()
            self.sums = [None] * len(self.weights)

    def freeze(self, positions):
        """What was added up for these variables is dropped."""
        for i in positions:
            self.sums[i] = None

    def _update(self):
        divisor = self.micro_steps * (self.scale or 1.0)
        present = [i for i, s in enumerate(self.sums) if s is not None]
        grads = [self.sums[i] / divisor for i in present]
        is_finite = all(np.isfinite(g).all() for g in grads)
        is_spike = is_finite and self.spikes is not None and self._is_spike(grads)
        if is_spike or (not is_finite and (self.skip or self.dynamic or self.spikes)):
            self.skipped += 1
            if not is_finite:
                self.finite_steps = 0
                if self.dynamic:
                    self.scale *= 0.5
            return
        weights = [self.weights[i] for i in present]
        self._show(self.clip, self.weights)
        clipped = self.clip(grads, weights, [self.paths[i] for i in present], self.updates)
        self.updates += 1
        self._apply(present, clipped)
        if self.dynamic:
            self.finite_steps += 1
            if self.finite_steps == self.growth_steps:
                self.scale, self.finite_steps = self.scale * 2.0, 0

    def _show(self, clip, weights):
        """Some clips look at weights whose gradient is not there."""
        clip.everything = dict(zip(self.paths, weights, strict=True))

    def _is_spike(self, grads):
        sigmas, window = self.spikes
        norm = np.sqrt(sum(np.sum(g * g) for g in grads))
        if norm**2 > FLOAT32_MAX:
            return True
        last, limit = self.norms[-window:], np.inf
        if len(last) >= window // 2:
            limit = np.mean(last) + sigmas * max(np.std(last), 0.01 * np.mean(last))
            self.is_close |= bool(abs(norm - limit) <= 1e-3 * limit)
        if norm > 0:
            self.norms.append(min(norm, limit))
        return norm > limit

    def _apply(self, present, clipped):
        before = [self.weights[i] for i in present]
        for i, g in zip(present, clipped, strict=True):
            self.weights[i] = self.inner(self.weights[i], g, self.slots[i], self.updates)
        self._bound_steps(present, before)

    def _bound_steps(self, present, before):
        if self.bound is None:
            return
        at = dict(zip(present, before, strict=True))
        self._show(self.bound, [at.get(i, w) for i, w in enumerate(self.weights)])
        steps = [self.weights[i] - w for i, w in zip(present, before, strict=True)]
        steps = self.bound(steps, before, [self.paths[i] for i in present], self.updates - 1)
        for i, w, step in zip(present, before, steps, strict=True):
            self.weights[i] = w + step
