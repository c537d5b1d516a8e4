"""Clippers that bound the elements of each variable's gradient: absolute and exponential."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from keras import ops

from keras_gradclip import _kernels as kernels
from keras_gradclip._deferred import Deferred, Rule, defer
from keras_gradclip._names import size_of
from keras_gradclip._types import Tensor, Threshold
from keras_gradclip.clippers._declaration import Card, parameter
from keras_gradclip.clippers._exponential import clip_exponential
from keras_gradclip.clippers.base import Clipper, ClipStats, register


def _clip_absolute(x: Tensor, seen: None, limit: Tensor) -> Tensor:
    del seen
    return kernels.clip_symmetric(x, limit)


def _clip_by_weight(x: Tensor, weight: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    return kernels.clip_symmetric(x, gamma * kernels.exp_of(beta, weight))


def _itself(weight: Tensor) -> Tensor:
    return weight


ABSOLUTE = Rule(_clip_absolute)
EXPONENTIAL = Rule(_clip_by_weight, sees=_itself)

ALPHA_NOTE = "'alpha' multiplies by exp(β·W) and belongs to ExponentialClip."


class _PerVariable(Clipper):
    """A clipper that treats each variable by itself and bounds elements."""

    rescale: str | None
    defers: ClassVar[bool] = True

    def apply(self, grads, variables, state, hyper):
        """Clip each gradient by itself: see `Clipper.apply`."""
        present = [i for i, g in enumerate(grads) if g is not None]
        before = [kernels.values(grads[i]) for i in present]
        clipped: list[Tensor] = [None] * len(grads)
        for i in present if self.rescale is None else ():
            clipped[i] = self._deferred(grads[i], variables[i], hyper)
        now = [i for i in present if clipped[i] is None]
        after = self._clip([grads[i] for i in now], [variables[i] for i in now], hyper)
        for i, y in zip(now, after, strict=True):
            y = rescaled(self.rescale, kernels.values(grads[i]), y)
            clipped[i] = kernels.with_values(grads[i], y)

        def fractions():
            result: list[Tensor] = [None] * len(grads)
            limits = [self._limit(grads[i], variables[i], hyper) for i in present]
            sizes = [size_of(variables[i]) for i in present]
            shares = kernels.fractions_over(before, limits, sizes)
            for i, share in zip(present, shares, strict=True):
                result[i] = share
            return result

        weights = [
            0.0 if g is None else float(size_of(v)) for g, v in zip(grads, variables, strict=True)
        ]
        return clipped, state, ClipStats(fractions, weights, "elements")

    def _clip(self, grads, variables, hyper) -> list[Tensor]:
        """The values of the clipped gradients; the rescale "alpha" is done here as well."""
        raise NotImplementedError  # abstract: each clipper's own

    def _deferred(self, gradient, variable, hyper) -> Deferred | None:
        """The gradient whose clip waits for the update, if it may; without a rescale."""
        raise NotImplementedError  # abstract: each clipper's own

    def _limit(self, gradient, variable, hyper) -> Tensor:
        """The threshold of one gradient's elements: a scalar, or of the shape of its values."""
        raise NotImplementedError  # abstract: each clipper's own


def rescaled(mode: str | None, before: Tensor, after: Tensor) -> Tensor:
    """A clipped gradient brought back to its size: see the table of equations in the README."""
    if mode not in ("norm", "max"):
        return after
    size = kernels.max_abs if mode == "max" else lambda x: ops.sqrt(kernels.sum_of_squares(x))
    return kernels.scale(after, kernels.ratio(size(before), size(after)))


@register("absolute")
@dataclasses.dataclass(frozen=True)
class AbsoluteClip(_PerVariable):
    """Absolute clipping: g' = clip(g, −c, c), element by element.

    Args:
        threshold: c, a positive number or a LearningRateSchedule. Useful from 0.01 to 0.1.
        rescale: None, "norm" (the L2 norm of each variable's gradient comes back) or "max" (its
            largest element comes back).

    Raises:
        ValueError: a threshold that is not above 0, or an unknown rescale.
    """

    threshold: Threshold = parameter(
        0.1, help="c, the largest element", range=(0.01, 0.1), log=True, live=True, threshold=True
    )
    rescale: str | None = parameter(
        None,
        help="give back the gradient's L2 norm or its largest element",
        choices=(None, "norm", "max"),
        search=True,
        note=ALPHA_NOTE,
    )
    measures: ClassVar[str | None] = "largest_element"
    card: ClassVar[Card | None] = Card(
        "g' = clip(g, −c, c), element by element",
        "single elements explode; turns the gradient",
        "c from 0.01 to 0.1",
        "Keras's `clipvalue`",
    )

    def _clip(self, grads, variables, hyper):
        return kernels.clip_each([kernels.values(g) for g in grads], hyper["threshold"])

    def _deferred(self, gradient, variable, hyper):
        return defer(hyper, ABSOLUTE, gradient, variable, hyper["threshold"])

    def _limit(self, gradient, variable, hyper):
        return hyper["threshold"]


@register("exponential")
@dataclasses.dataclass(frozen=True)
class ExponentialClip(_PerVariable):
    """Exponential clipping: the threshold α grows exponentially with the weight W.

    α = γ·exp(β·W) element by element, g' = clip(g, −α, α). With γ = 1 the threshold is near 1
    for small weights and rarely clips: watch `clip_fraction`, and lower γ (0.01 to 0.1) if it
    stays at 0.

    Args:
        beta: β, positive number or LearningRateSchedule. Useful from 0.5 to 1, larger for
            deeper networks.
        gamma: γ, positive number or LearningRateSchedule.
        weight: "elementwise" (W is the weight itself), "rms" (one α a variable, from the root
            mean square of its weights) or "none" (the fixed coefficient α = γ·exp(β)).
        rescale: None, "norm", "max" (see `AbsoluteClip`) or "alpha": g'·exp(β·W), the exp of α
            without γ.

    Raises:
        ValueError: β or γ not above 0, an unknown weight mode or rescale.
    """

    beta: Threshold = parameter(0.7, help="β, slope over the weights", range=(0.5, 1.0), live=True)
    gamma: Threshold = parameter(
        1.0,
        help="γ, factor of the threshold; 1 rarely clips",
        range=(0.01, 0.1),
        log=True,
        live=True,
        threshold=True,
    )
    weight: str = parameter(
        "elementwise",
        help="which W the threshold follows; none: one fixed threshold",
        choices=("elementwise", "rms", "none"),
        search=True,
    )
    rescale: str | None = parameter(
        None,
        help="give back the gradient's L2 norm or largest element; alpha: multiply by exp(β·W)",
        choices=(None, "norm", "max", "alpha"),
        search=True,
    )
    measures: ClassVar[str | None] = "largest_scaled_element"
    card: ClassVar[Card | None] = Card(
        "the same with c = γ·exp(β·W) for each element",
        "as above, and large weights may move more",
        "β from 0.5 to 1; lower γ until it clips",
        "this library",
    )

    def _clip(self, grads, variables, hyper):
        return clip_exponential(
            [kernels.values(g) for g in grads],
            [self._weight(v, g) for v, g in zip(variables, grads, strict=True)],
            hyper["beta"],
            hyper["gamma"],
            rescale=self.rescale == "alpha",
        )

    def _deferred(self, gradient, variable, hyper):
        if self.weight == "elementwise":
            return defer(hyper, EXPONENTIAL, gradient, variable, hyper["beta"], hyper["gamma"])
        if self.weight == "none":
            alpha = hyper["gamma"] * kernels.exp_of(hyper["beta"], ops.ones((), "float32"))
            return defer(hyper, ABSOLUTE, gradient, variable, alpha)
        return None

    def _limit(self, gradient, variable, hyper):
        return hyper["gamma"] * kernels.exp_of(hyper["beta"], self._weight(variable, gradient))

    def _weight(self, variable, gradient) -> Tensor:
        """W of the equation: of the shape of the gradient's values, or a scalar."""
        if self.weight == "elementwise":
            return kernels.matching_weight(variable, gradient)
        if self.weight == "rms":
            return kernels.rms(ops.convert_to_tensor(kernels.read(variable)))
        return ops.ones((), "float32")
