"""Clippers that bound a size of the gradient: its norm, or a variable's root mean square."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from typing import ClassVar

from keras import ops

from keras_gradclip import _kernels as kernels
from keras_gradclip._deferred import Rule, defer
from keras_gradclip._names import SCOPES, scope_numbers, size_of
from keras_gradclip._types import Gradient, Hyper, Tensor, Threshold, Variable
from keras_gradclip.clippers._declaration import Card, parameter
from keras_gradclip.clippers.base import Clipper, ClipStats, register
from keras_gradclip.clippers.elementwise import ALPHA_NOTE, rescaled


def _scale(x: Tensor, seen: None, factor: Tensor) -> Tensor:
    del seen
    return kernels.scale(x, factor)


SCALE = Rule(_scale, is_factor=True)


def scaled(gradient: Gradient, variable: Variable, factor: Tensor, hyper: Hyper) -> Gradient:
    """gradient·factor, a scalar: now, or where it is applied."""
    waiting = defer(hyper, SCALE, gradient, variable, factor)
    if waiting is not None:
        return waiting
    return kernels.with_values(gradient, kernels.scale(kernels.values(gradient), factor))


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
        rescale: None, "norm" or "max". Both undo a norm clip, which changes nothing but the
            size; they are here for symmetry and warn.

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
    keeps_direction: ClassVar[bool] = True
    defers: ClassVar[bool] = True
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

    def apply(self, grads, variables, state, hyper):
        """Clip by the norm of each scope: see `Clipper.apply`."""
        present = [i for i, g in enumerate(grads) if g is not None]
        scopes = scope_numbers(self.scope, [variables[i] for i in present])
        clipped: list[Tensor] = [None] * len(grads)
        squares: list[Tensor] = [None] * len(grads)
        weights = [0.0] * len(grads)
        if not present:
            return clipped, state, ClipStats(lambda: list(clipped), weights, "norms", squares)

        for i in present:
            squares[i] = kernels.sum_of_squares(kernels.values(grads[i]))
        factors = kernels.clip_factors(
            [squares[i] for i in present],
            [size_of(variables[i]) for i in present],
            scopes,
            hyper["max_norm"],
        )
        members = collections.Counter(scopes)
        for i, scope in zip(present, scopes, strict=True):
            if self.rescale is None:
                clipped[i] = scaled(grads[i], variables[i], factors[scope], hyper)
            else:
                x = kernels.values(grads[i])
                y = rescaled(self.rescale, x, kernels.scale(x, factors[scope]))
                clipped[i] = kernels.with_values(grads[i], y)
            weights[i] = 1.0 / members[scope]

        def fractions():
            hit = ops.unstack(kernels.float32(ops.stack(factors) < 1.0), num=len(factors))
            result: list[Tensor] = [None] * len(grads)
            for i, scope in zip(present, scopes, strict=True):
                result[i] = hit[scope]
            return result

        return clipped, state, ClipStats(fractions, weights, "norms", squares)


@register("rms")
@dataclasses.dataclass(frozen=True)
class RMSClip(Clipper):
    """Block RMS clipping: g' = g / max(1, rms(g)/c), for each variable.

    One threshold means the same for a bias of 10 elements and a kernel of a million, where that of
    `NormClip(scope="variable")` depends on the size of the variable. Suggested: c = 1 on normalised
    updates (Shazeer and Stern, "Adafactor", arXiv 1804.04235, section 6); on raw gradients a
    percentile of what `calibrate` sees. The same as `optax.clip_by_block_rms`.

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
    measures: ClassVar[str | None] = "largest_rms"
    keeps_direction: ClassVar[bool] = True
    defers: ClassVar[bool] = True
    card: ClassVar[Card | None] = Card(
        "g' = g / max(1, rms(g)/c), for each variable",
        "one threshold for variables of every size",
        "a percentile of the rms (`calibrate`)",
        "Shazeer and Stern, 1804.04235",
    )

    def apply(self, grads, variables, state, hyper):
        """Clip by the root mean square: see `Clipper.apply`."""
        clipped, squares, factors = ([None] * len(grads) for _ in range(3))
        for i, (g, variable) in enumerate(zip(grads, variables, strict=True)):
            if g is None:
                continue
            x = kernels.values(g)
            square = kernels.sum_of_squares(x)
            # A sparse gradient is zero in the rows that it does not hold: they count.
            rms = ops.sqrt(square / max(size_of(variable), 1))
            squares[i], factors[i] = square, kernels.clip_factor(rms, hyper["threshold"])
            clipped[i] = scaled(g, variable, factors[i], hyper)

        def fractions():
            return [None if f is None else kernels.float32(f < 1.0) for f in factors]

        weights = [1.0] * len(variables)
        return clipped, state, ClipStats(fractions, weights, "norms", squares)
