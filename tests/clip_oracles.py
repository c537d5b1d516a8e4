"""For every clipper of the registry what it does, in float64 NumPy, with its memory."""

import re

import numpy as np
import oracles

import keras_gradclip as kgc
from keras_gradclip.clippers.units import default_unit_axes


class Variable:
    """What the table of axes asks of a variable."""

    def __init__(self, path, shape):
        self.path, self.shape = path, shape


def is_vector(variable):
    return len(variable.shape) <= 1 or "bias" in variable.path.rpartition("/")[2]


def scopes(scope, paths):
    return {
        "layer": [p.rpartition("/")[0] for p in paths],
        "variable": list(paths),
        "global": [0] * len(paths),
    }[scope]


def now(value, step):
    """A hyper-parameter at the update after `step` others."""
    return float(value(step)) if callable(value) else float(value)


def elementwise(clipper, grads, weights, paths, step, rate):
    threshold = now(clipper.threshold, step)
    return [oracles.absolute(g, None, threshold, clipper.rescale) for g in grads]


def exponential(clipper, grads, weights, paths, step, rate):
    beta, gamma = now(clipper.beta, step), now(clipper.gamma, step)
    return [
        oracles.exponential(g, w, beta, gamma, clipper.weight, clipper.rescale)
        for g, w in zip(grads, weights, strict=True)
    ]


def norm(clipper, grads, weights, paths, step, rate):
    clipped = oracles.norm(grads, scopes(clipper.scope, paths), now(clipper.max_norm, step))
    return [oracles.rescale(clipper.rescale, g, c) for g, c in zip(grads, clipped, strict=True)]


def rms(clipper, grads, weights, paths, step, rate):
    return [oracles.rms_clip(g, now(clipper.threshold, step)) for g in grads]


def adaptive(clipper, grads, weights, paths, step, rate):
    factor = now(clipper.clip_factor, step)
    return [
        oracles.agc(g, w, default_unit_axes(Variable(p, g.shape)), factor, clipper.eps)
        for g, w, p in zip(grads, weights, paths, strict=True)
    ]


def update_ratio(clipper, grads, weights, paths, step, rate):
    """`rate`: the learning rate that the bound is divided by."""
    axes, groups = [], []
    for g, path in zip(grads, paths, strict=True):
        variable = Variable(path, g.shape)
        unit = default_unit_axes(variable) if clipper.scope == "unit" else tuple(range(g.ndim))
        axes.append(None if is_vector(variable) else unit)
        groups.append(path.rpartition("/")[0] if clipper.scope == "layer" else None)
    ratio = now(clipper.max_ratio, step)
    return oracles.update_ratio(grads, weights, axes, groups, ratio, rate, clipper.eps)


def bound_biases(clipper, grads, paths, step, rate, everything):
    """A bias by the last kernel of its layer that has as many units; `everything`: path to weight.

    Whether that kernel has a gradient of its own does not matter.
    """
    ratio, result = now(clipper.max_ratio, step), []
    for g, path in zip(grads, paths, strict=True):
        norms = None
        for other, weight in everything.items():
            is_beside = other.rpartition("/")[0] == path.rpartition("/")[0]
            if is_beside and not is_vector(Variable(other, weight.shape)):
                axes = default_unit_axes(Variable(other, weight.shape))
                of_units = np.sqrt(np.sum(weight**2, axis=axes))
                norms = of_units if of_units.size == g.size else norms
        if is_vector(Variable(path, g.shape)) and norms is not None:
            limit = ratio * np.maximum(norms.reshape(g.shape), clipper.eps) / rate
            g = np.clip(g, -limit, limit)
        result.append(g)
    return result


class Remembering:
    """A clipper whose limits follow from the norms of the updates before."""

    def __init__(self, memory, tell):
        self.memory, self.tell = memory, tell

    def __call__(self, clipper, grads, weights, paths, step, rate):
        own = scopes(clipper.scope, paths)
        norms = {}
        for g, s in zip(grads, own, strict=True):
            norms[s] = norms.get(s, 0.0) + np.sum(g**2)
        norms = {s: oracles.norms(np.sqrt(n)) for s, n in norms.items()}
        is_finite = {s: np.isfinite(n) for s, n in norms.items()}
        self.tell(self.memory, clipper, step)
        limits = self.memory({s: n if is_finite[s] else 0.0 for s, n in norms.items()})
        return [
            (g * min(1.0, limits[s] / norms[s]) if norms[s] > 0 else g) if is_finite[s] else 0.0 * g
            for g, s in zip(grads, own, strict=True)
        ]


def percentile(clipper):
    def tell(memory, clipper, step):
        memory.percentile = now(clipper.percentile, step)

    return Remembering(oracles.PercentileOracle(None, clipper.window), tell)


def zscore(clipper):
    def tell(memory, clipper, step):
        memory.threshold = now(clipper.z_threshold, step)

    memory = oracles.ZScoreOracle(
        None, clipper.alpha, clipper.warmup_steps, clipper.option, clipper.eps
    )
    return Remembering(memory, tell)


def ada(clipper):
    def tell(memory, clipper, step):
        memory.rel, memory.abs = now(clipper.lambda_rel, step), now(clipper.lambda_abs, step)

    return Remembering(oracles.AdaOracle(None, None, clipper.beta, clipper.warmup_steps), tell)


#: A new clipper needs a line here: the fuzz test asks for every name in the registry.
STATELESS = {
    kgc.AbsoluteClip: elementwise,
    kgc.ExponentialClip: exponential,
    kgc.NormClip: norm,
    kgc.RMSClip: rms,
    kgc.AdaptiveClip: adaptive,
    kgc.UpdateRatioClip: update_ratio,
}
STATEFUL = {kgc.PercentileClip: percentile, kgc.ZScoreClip: zscore, kgc.AdaClip: ada}


def limits_updates(clipper):
    """Whether a clipper, or one inside it, limits weight updates."""
    if isinstance(clipper, kgc.Chain):
        return any(map(limits_updates, clipper.clippers))
    if isinstance(clipper, kgc.ClipMap):
        return any(limits_updates(c) for c in (*dict(clipper.rules).values(), clipper.default))
    return clipper is not None and clipper.stage == "update"


class Clip:
    """The twin of one clipper, also of a nested one.

    Args:
        clipper: the clipper.
        rate: a function of the number of updates before.
        steps: where an update has two passes, whether this is the one over steps: those have the
            learning rate in them.

    Attributes:
        everything: path to weight, also of variables without a gradient, or of another rule.
    """

    def __init__(self, clipper, rate, steps=None):
        self.clipper, self.rate, self.steps = clipper, rate, steps
        self.largest_rate, self.everything = 0.0, None
        if isinstance(clipper, kgc.Chain):
            self.parts = [Clip(c, rate, steps) for c in clipper.clippers]
        elif isinstance(clipper, kgc.ClipMap):
            self.parts = {}
        elif clipper is not None:
            make = STATEFUL.get(type(clipper))
            self.own = make(clipper) if make else STATELESS[type(clipper)]

    def __call__(self, grads, weights, paths, step):
        rate = self.rate(step)
        self.largest_rate = max(self.largest_rate, rate)
        if self.clipper is None or not grads:
            return grads
        if isinstance(self.clipper, kgc.Chain):
            for part in self.parts:
                part.everything = self.everything
                grads = part(grads, weights, paths, step)
            return grads
        if isinstance(self.clipper, kgc.ClipMap):
            return self._by_rule(grads, weights, paths, step)
        if self.steps is not None and self.steps != (self.clipper.stage == "update"):
            return grads
        divisor = self.largest_rate if getattr(self.clipper, "anneal", None) else rate
        divisor = divisor / rate if self.steps else divisor
        clipped = self.own(self.clipper, grads, weights, paths, step, divisor)
        if self.clipper.biases == "unit":
            clipped = bound_biases(self.clipper, clipped, paths, step, divisor, self.everything)
        return clipped

    def change(self, factor):
        """Multiply the first threshold that is a number, as somebody may in mid-training."""
        known = {} if self.clipper is None else self.clipper.hyperparameters()
        key = next((k for k, v in known.items() if not callable(v)), None)
        if key is not None:
            self._set(self.clipper.with_hyperparameters({**known, key: factor * known[key]}))

    def _set(self, clipper):
        self.clipper = clipper
        if isinstance(clipper, kgc.Chain):
            for part, own in zip(self.parts, clipper.clippers, strict=True):
                part._set(own)
        elif isinstance(clipper, kgc.ClipMap):
            rules = dict([*clipper.rules, (".*", clipper.default)])
            for rule, part in self.parts.items():
                part._set(rules[rule])

    def _by_rule(self, grads, weights, paths, step):
        """The first rule that matches has a variable; its norms are over its own variables."""
        rules = [*self.clipper.rules, (".*", self.clipper.default)]
        rule_of = [next(r for r, _ in rules if re.fullmatch(r, path)) for path in paths]
        result = list(grads)
        for rule, clipper in rules:
            part = self.parts.setdefault(rule, Clip(clipper, self.rate, self.steps))
            part.everything = self.everything  # a bias's kernel may have another rule
            chosen = [i for i, name in enumerate(rule_of) if name == rule]
            lists = ([values[i] for i in chosen] for values in (grads, weights, paths))
            for i, g in zip(chosen, part(*lists, step), strict=True):
                result[i] = g
        return result
