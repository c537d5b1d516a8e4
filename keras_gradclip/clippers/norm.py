"""Clippers that limit the norm of a gradient, or a variable's root mean square."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import ClassVar

from keras_gradclip._types import Hyper, Tensor, Threshold
from keras_gradclip.clippers.base import Clipper, register
from keras_gradclip.clippers.elementwise import ALPHA_NOTE
from keras_gradclip.clippers.enforce import Weight
from keras_gradclip.declarations import Card, parameter
from keras_gradclip.names import SCOPES


@register("norm")
@dataclasses.dataclass(frozen=True)
class NormClip(Clipper):
    """Norm clipping: g' = g·min(1, max_norm/‖g‖), ‖·‖ the L2 norm over the scope.

    Norms are taken in float32 whatever the gradient's dtype. Where the norm is not finite, the
    factor is 0: one infinite element does not turn the other gradients into NaN.

    Args:
        max_norm: positive number or LearningRateSchedule.
        scope: "layer" (all variables of a layer together), "variable" (as Keras's `clipnorm`) or
            "global" (as Keras's `global_clipnorm` and PyTorch's `clip_grad_norm_`).
        rescale: None, "norm" or "max". Both undo a norm clip, which changes only the size;
            they exist for symmetry and warn.

    Raises:
        ValueError: max_norm not above 0, an unknown scope or rescale.
    """

    max_norm: Threshold = parameter(
        1.0, help="the largest L2 norm", range=(0.1, 10.0), log=True, live=True, threshold=True
    )
    scope: str = parameter("layer", help="what one norm is taken over", choices=SCOPES)
    rescale: str | None = parameter(
        None,
        help="undoes the clip, and warns: here for symmetry",
        choices=(None, "norm", "max"),
        note=ALPHA_NOTE,
    )
    measures: ClassVar[str | None] = "layer_norm"
    card: ClassVar[Card | None] = Card(
        "g' = g·min(1, c/‖g‖)",
        "the first thing to try; keeps the direction",
        "the 90th percentile of the norm (`calibrate`); 1 globally for transformers",
        "Pascanu et al., 1211.5063",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rescale is not None:
            warnings.warn(
                f"NormClip: rescale={self.rescale!r} brings the norm back that the clip took "
                "away, so the gradient stays as it was. Use rescale=None.",
                stacklevel=3,
            )

    def limit(self, weight: Weight, hyper: Hyper) -> Tensor:
        """max_norm."""
        return hyper["max_norm"]


@register("rms")
@dataclasses.dataclass(frozen=True)
class RMSClip(Clipper):
    """Block RMS clipping: g' = g / max(1, rms(g)/c), for each variable.

    One threshold means the same for a bias of 10 elements and a kernel of a million, where that of
    `NormClip(scope="variable")` depends on the size of the variable. Suggested: c = 1 on normalised
    updates (Shazeer and Stern, "Adafactor", arXiv 1804.04235, section 6); on raw gradients a
    percentile from `calibrate`. The same as `optax.clip_by_block_rms`.

    Args:
        threshold: c, a positive number or a LearningRateSchedule.

    Raises:
        ValueError: a threshold that is not above 0.
    """

    threshold: Threshold = parameter(
        1.0,
        help="c, the largest root mean square",
        range=(0.001, 1.0),
        log=True,
        live=True,
        threshold=True,
    )
    scope = "variable"
    measures: ClassVar[str | None] = "largest_rms"
    card: ClassVar[Card | None] = Card(
        "g' = g / max(1, rms(g)/c), for each variable",
        "one threshold for variables of every size",
        "a percentile of the rms (`calibrate`)",
        "Shazeer and Stern, 1804.04235",
    )

    def limit(self, weight: Weight, hyper: Hyper) -> Tensor:
        """c·√size, the norm of a gradient whose root mean square is c."""
        return hyper["threshold"] * math.sqrt(weight.size)
