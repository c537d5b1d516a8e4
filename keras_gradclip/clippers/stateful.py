"""Clippers that store past gradient norms and set their own thresholds.

Their state is a few numbers for each scope (a layer, a variable, or the whole model), stored in the
optimizer's variables: the same on every replica, because every replica gets the same reduced
gradients; saved and restored with the optimizer. Non-finite norms are never stored, nor are norms
of 0, as from a masked batch or an expert without examples. A call `clipper(grads, variables)`
starts from an empty state; loops that need the state use `init` and `apply`, or `ClippedOptimizer`.
Counters are float32 and bounded, because TensorFlow places int32 variables on the CPU, out of reach
of a compiled step on the GPU.

Departures from the papers:

- `PercentileClip`: AutoClip, like its code (`numpy.percentile` of all global norms), keeps every
  norm since the start; a window bounds the memory and forgets the first steps. The package
  `autoclip` 0.2.1 has a window of 1000 too, and the 90th percentile. If norms fall a hundredfold
  within an epoch, a window of 1000 clips nothing for the rest of a short run.
- `ZScoreClip`: σ counts as at least 0.1·μ, and a norm of 0 is not remembered. ZClip's code
  (bluorion-com/ZClip: the same three defaults and formulas) also bounds the norm by 1 throughout:
  `Chain([ZScoreClip(), NormClip(1.0, "global")])`.
- `AdaClip`: the formulas are those of the authors' repository (PaddlePaddle/PaddleFleet,
  Research/AdaGC), the four values the defaults of the package `pytorch_optimizer`, not checked
  against the paper's tables. A norm of 0 is not remembered: γ = 0 would freeze a zero-initialised
  tensor for good.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import ClassVar

import numpy as np
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip._types import Hyper, Limits, State, Tensor, Threshold
from keras_gradclip.clippers.base import Clipper, register
from keras_gradclip.declarations import Card, parameter
from keras_gradclip.names import SCOPES

#: Means "no limit" and "no norm yet"; an infinity would become NaN in divisions.
NO_LIMIT = 1e38
#: Smallest deviation in `ZScoreClip`, as a share of the mean, so that after nearly equal norms a
#: slightly different one is no spike.
LEAST_DEVIATION = 0.1
_MOMENTS = ("mean", "variance", "count")


def _where(usable: Tensor, new: State, old: State) -> State:
    """The new state of each scope whose norm may be stored, and the old one of the others."""

    def chosen(after: Tensor, before: Tensor) -> Tensor:
        flags = ops.reshape(usable, (-1, *[1] * (len(after.shape) - 1)))
        return ops.where(flags, after, ops.convert_to_tensor(before))

    return {name: chosen(new[name], old[name]) for name in new}


@register("percentile")
@dataclasses.dataclass(frozen=True)
class PercentileClip(Clipper):
    """AutoClip: the threshold is a percentile of the norms seen so far.

    g' = g·min(1, c/‖g‖), c the p-th percentile of the last `window` norms, including the present
    one: it clips about 1 − p/100 of the steps, nine in ten with the paper's p = 10; p = 90 protects
    against spikes. Source: Seetharaman et al., arXiv 2007.14469.

    Args:
        percentile: p in 0..100, or a LearningRateSchedule.
        window: the number of norms to store.
        scope: "global" (as in the paper), "layer" or "variable".

    Raises:
        ValueError: an argument out of its range.
    """

    percentile: Threshold = parameter(
        10.0,
        help="p in 0..100: clips about 1 − p/100 of the steps",
        range=(10.0, 95.0),
        live=True,
        threshold=True,
        at_most=100.0,
    )
    window: int = parameter(1000, help="how many norms to remember")
    scope: str = parameter("global", help="what one norm is taken over", choices=SCOPES)
    card: ClassVar[Card | None] = Card(
        "a norm clip whose c is a percentile of the last norms",
        "the scale is unknown or drifts",
        "10 as in the paper; 90 as a guard, with a short window where the norms fall",
        "Seetharaman et al., 2007.14469; window 1000 as in the package `autoclip` 0.2.1",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.percentile, float) and self.percentile < 1:
            warnings.warn(
                f"PercentileClip: percentile={self.percentile:g} is on a scale of 0 to 100, and "
                f"clips nearly every step. Write {100 * self.percentile:g} if a share was meant.",
                stacklevel=3,
            )

    def memory(self, scopes: int) -> dict[str, object]:
        """An empty history: `[scopes, window]` norms, the next slot, and how many are filled."""
        history = np.full((scopes, self.window), NO_LIMIT, "float32")
        zeros = np.zeros((scopes,), "float32")
        return {"history": history, "slot": zeros, "filled": zeros}

    def limits(self, norms: Tensor, usable: Tensor, state: State, hyper: Hyper) -> Limits:
        """The percentile of each scope's stored norms; see `Limit.limits`."""
        slot, filled = (ops.convert_to_tensor(state[k]) for k in ("slot", "filled"))
        is_next = ops.equal(ops.arange(self.window, dtype="float32")[None, :], slot[:, None])
        new = {
            "history": ops.where(is_next, norms[:, None], ops.convert_to_tensor(state["history"])),
            "slot": (slot + 1.0) % self.window,
            "filled": ops.minimum(filled + 1.0, float(self.window)),
        }
        state = _where(usable, new, state)
        share = ops.minimum(hyper["percentile"], 100.0) / 100.0
        return _percentile(state["history"], state["filled"], share), state


def _percentile(history: Tensor, filled: Tensor, share: Tensor) -> Tensor:
    """The percentile of each row's filled slots, as `numpy.percentile`; others are `NO_LIMIT`."""
    ordered = ops.sort(history, axis=1)
    last = ops.maximum(filled - 1.0, 0.0)
    position = last * share
    low = ops.floor(position)
    slots = ops.arange(history.shape[1], dtype="float32")
    # `ops.take_along_axis` takes six times as many operations on TensorFlow.
    below, above = (
        ops.sum(ops.where(ops.equal(slots, i[:, None]), ordered, 0.0), axis=1)
        for i in (low, ops.minimum(low + 1.0, last))
    )
    return below + (above - below) * (position - low)


@register("zscore")
@dataclasses.dataclass(frozen=True)
class ZScoreClip(Clipper):
    """ZClip: clips norms that stand out from their running mean and deviation.

    z = (‖g‖ − μ)/(σ + ε). Where z > z_threshold, the norm is brought down to
    μ + σ·z_threshold²/z ("adaptive": the further out, the harder) or to μ ("mean"). The first
    `warmup_steps` norms are not clipped. Source: Kumar et al., arXiv 2504.02507.

    Args:
        z_threshold: positive number or LearningRateSchedule.
        alpha: α, between 0 and 1, of the running mean and variance.
        warmup_steps: a whole number of at least 1.
        option: "adaptive" or "mean".
        scope: "global" (as in the paper), "layer" or "variable".
        eps: ε, positive.

    Raises:
        ValueError: an argument out of its range.
    """

    z_threshold: Threshold = parameter(
        2.5, help="deviations beyond which it clips", range=(1.5, 4.0), live=True, threshold=True
    )
    alpha: float = parameter(0.97, help="α, memory of the running mean", below=1.0)
    warmup_steps: int = parameter(25, help="norms that only feed the memory")
    option: str = parameter(
        "adaptive",
        help="what a spike is brought down to",
        choices=("adaptive", "mean"),
        flag="zscore_option",
    )
    scope: str = parameter("global", help="what one norm is taken over", choices=SCOPES)
    eps: float = parameter(1e-6, help="ε beside the deviation")
    card: ClassVar[Card | None] = Card(
        "clips norms that stand out from their running mean",
        "rare spikes in long runs",
        "z = 2.5, α = 0.97, 25 steps of warm-up",
        "Kumar et al., 2504.02507; the defaults of its code, bluorion-com/ZClip",
    )

    def memory(self, scopes: int) -> dict[str, object]:
        """No norms yet: for each scope the mean, the variance and the number of norms."""
        return {name: np.zeros((scopes,), "float32") for name in _MOMENTS}

    def limits(self, norms: Tensor, usable: Tensor, state: State, hyper: Hyper) -> Limits:
        """The norm that a spike is brought down to; see `Limit.limits`."""
        mean, variance, count = (ops.convert_to_tensor(state[name]) for name in _MOMENTS)
        warm = ops.greater_equal(count, self.warmup_steps)
        deviation = ops.maximum(ops.sqrt(variance), LEAST_DEVIATION * mean)
        z = (norms - mean) / (deviation + self.eps)
        threshold, target = hyper["z_threshold"], mean
        if self.option == "adaptive":  # the threshold's square may be beyond float32
            target = mean + deviation * threshold * (threshold / ops.maximum(z, self.eps))
        limits = ops.where(ops.logical_and(warm, z > threshold), target, NO_LIMIT)
        norm = ops.minimum(norms, limits)
        early = _welford(mean, variance, count, norm)
        late = _averaged(mean, variance, norm, self.alpha)
        new = {name: ops.where(warm, late[name], early[name]) for name in early}
        new["count"] = ops.minimum(count + 1.0, float(self.warmup_steps))
        return limits, _where(usable, new, state)


def _welford(mean: Tensor, variance: Tensor, count: Tensor, norm: Tensor) -> State:
    """The mean and the population variance of `count` norms and one more."""
    new = mean + (norm - mean) / (count + 1.0)
    spread = variance + ((norm - mean) * (norm - new) - variance) / (count + 1.0)
    return {"mean": new, "variance": spread}


def _averaged(mean: Tensor, variance: Tensor, norm: Tensor, alpha: float) -> State:
    """The running averages of the norm, and of its squared distance from their new mean."""
    new = alpha * mean + (1 - alpha) * norm
    return {"mean": new, "variance": alpha * variance + (1 - alpha) * ops.square(norm - new)}


@register("ada")
@dataclasses.dataclass(frozen=True)
class AdaClip(Clipper):
    """AdaGC: each tensor's norm is held near the running average of its own clipped norms.

    g'_i = g_i·min(1, λ_rel·γ_i/‖g_i‖), then γ_i ← β·γ_i + (1−β)·‖g'_i‖. During the first
    `warmup_steps` updates the whole gradient is clipped by its global norm,
    g' = g·min(1, λ_abs/‖g‖), and γ_i ← min(γ_i, ‖g'_i‖). Source: Wang et al., arXiv 2502.11034,
    algorithm 1.

    Args:
        lambda_rel: λ_rel, positive number or LearningRateSchedule.
        lambda_abs: λ_abs, positive number or LearningRateSchedule.
        beta: β, between 0 and 1.
        warmup_steps: a whole number of at least 1.
        scope: "variable" (as in the paper), "layer" or "global".

    Raises:
        ValueError: an argument out of its range.
    """

    lambda_rel: Threshold = parameter(
        1.05,
        help="λ_rel, the norm at most so many times its running average",
        range=(1.01, 1.5),
        live=True,
        threshold=True,
    )
    lambda_abs: Threshold = parameter(
        1.0, help="λ_abs, the global norm during the warm-up", live=True
    )
    beta: float = parameter(0.98, help="β, memory of the running average", below=1.0)
    warmup_steps: int = parameter(100, help="updates under the global norm clip")
    scope: str = parameter("variable", help="what one norm is taken over", choices=SCOPES)
    card: ClassVar[Card | None] = Card(
        "each tensor's norm near the running average of its own",
        "single tensors spike while the global norm looks calm",
        "λ_rel = 1.05, β = 0.98, 100 steps of warm-up",
        "Wang et al., 2502.11034; defaults of the package `pytorch_optimizer`, not checked",
    )

    def memory(self, scopes: int) -> dict[str, object]:
        """No norms yet: γ for each scope, and the number of updates."""
        gamma = np.full((scopes,), NO_LIMIT, "float32")
        return {"gamma": gamma, "count": np.zeros((1,), "float32")}

    def limits(self, norms: Tensor, usable: Tensor, state: State, hyper: Hyper) -> Limits:
        """λ_rel·γ of each scope, or the share of the global limit; see `Limit.limits`."""
        gamma, count = (ops.convert_to_tensor(state[k]) for k in ("gamma", "count"))
        warm = ops.greater_equal(count, self.warmup_steps)
        total = ops.sqrt(ops.sum(ops.square(norms)))
        global_factor = arithmetic.clip_factor(total, hyper["lambda_abs"])
        # A threshold of factor·norm is the global clip, said scope by scope.
        early = ops.where(norms * global_factor < norms, norms * global_factor, NO_LIMIT)
        limits = ops.where(warm, ops.minimum(hyper["lambda_rel"] * gamma, NO_LIMIT), early)

        norm = ops.minimum(norms, limits)
        average = self.beta * gamma + (1 - self.beta) * norm
        average = ops.where(gamma >= NO_LIMIT, norm, average)
        new = {"gamma": ops.where(warm, average, ops.minimum(gamma, norm))}
        new = _where(ops.logical_and(usable, ops.isfinite(total)), new, state)
        return limits, {**new, "count": ops.minimum(count + 1.0, float(self.warmup_steps))}
