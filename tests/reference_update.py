"""One whole update in float64 NumPy: what the optimizer promises, slow and plain on purpose.

add up micro-batches → sum over replicas → (sparse rows merged) → unscale →
anything not finite? skip, and the loss scale falls → clip → SGD with momentum, or Adam
(→ where a clipper bounds what is applied: the change of the weights, clipped)
"""

import dataclasses

import numpy as np
import oracles


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


#: Functions of (gradients, weights, paths, number of updates before); gradients without None.
CLIPS = {
    "none": lambda grads, weights, paths, step: grads,
    "absolute": lambda grads, weights, paths, step: [oracles.absolute(g, None, 0.3) for g in grads],
    "exponential": lambda grads, weights, paths, step: [
        oracles.exponential(g, w, 0.7, 0.2, "elementwise")
        for g, w in zip(grads, weights, strict=True)
    ],
    "layer norm": lambda grads, weights, paths, step: oracles.norm(
        grads, [p.rpartition("/")[0] for p in paths], 0.5
    ),
    "global norm": lambda grads, weights, paths, step: oracles.norm(grads, [0] * len(grads), 0.5),
}


@dataclasses.dataclass
class ReferenceUpdate:
    """An optimizer around float64 weights; `call` is one call of `apply` on every replica.

    Attributes:
        weights: list of float64 arrays, changed in place.
        paths: the path of each weight.
        clip: a function as in `CLIPS`.
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
    clip: object = CLIPS["none"]
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
        if hasattr(clip, "everything"):
            clip.everything = dict(zip(self.paths, weights, strict=True))

    def _is_spike(self, grads):
        sigmas, window = self.spikes
        norm = np.sqrt(sum(np.sum(g * g) for g in grads))
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
