"""Clippers that limit the elements of a gradient: absolute and exponential."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip._types import Hyper, Tensor, Threshold
from keras_gradclip.clippers.base import Clipper, register
from keras_gradclip.clippers.enforce import Weight
from keras_gradclip.declarations import Card, parameter

ALPHA_NOTE = "'alpha' multiplies by exp(β·W) and belongs to ExponentialClip."


@register("absolute")
@dataclasses.dataclass(frozen=True)
class AbsoluteClip(Clipper):
    """Absolute clipping: g' = clip(g, −c, c), element by element.

    Args:
        threshold: c, a positive number or a LearningRateSchedule. Useful from 0.01 to 0.1.
        rescale: None, "norm" (restores the L2 norm of each variable's gradient) or "max"
            (restores its largest element).

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

    def limit(self, weight: Weight, hyper: Hyper) -> Tensor:
        """The threshold c."""
        return hyper["threshold"]


@register("exponential")
@dataclasses.dataclass(frozen=True)
class ExponentialClip(Clipper):
    """Exponential clipping: the threshold α grows exponentially with the weight W.

    α = γ·exp(β·W) element by element, g' = clip(g, −α, α). With γ = 1 the threshold is near 1
    for small weights and rarely clips: watch `clip_fraction`, and lower γ (0.01 to 0.1) if it
    stays at 0.

    Args:
        beta: β, positive number or LearningRateSchedule. Useful from 0.5 to 1, larger for
            deeper networks.
        gamma: γ, positive number or LearningRateSchedule.
        weight: "elementwise" (W is the weight itself), "rms" (one α per variable, from the root
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

    def limit(self, weight: Weight, hyper: Hyper) -> Tensor:
        """γ·exp(β·W)."""
        return hyper["gamma"] * self.growth(weight, hyper)

    def growth(self, weight: Weight, hyper: Hyper) -> Tensor:
        """exp(β·W), kept finite."""
        if self.weight == "none":
            return arithmetic.exp_of(hyper["beta"], ops.ones((), "float32"))
        w = weight.rms if self.weight == "rms" else weight.values
        return arithmetic.exp_of(hyper["beta"], w)
