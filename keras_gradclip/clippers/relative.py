"""Clippers whose limit is proportional to the weights' norm: AGC and the update ratio."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, TypeAlias

import keras
import numpy as np
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip._types import Config, Hyper, State, Tensor, Threshold
from keras_gradclip.clippers.base import Clipper, register
from keras_gradclip.clippers.enforce import RATE_IS_SET, Weight
from keras_gradclip.declarations import Card, parameter
from keras_gradclip.names import path_of

#: Pairs of a variable's path and the axes that a unit of it spans.
Axes: TypeAlias = Sequence[tuple[str, tuple[int, ...]]] | None


class ByUnit(Clipper):
    """Base of clippers by unit, with `axes` for variables of unknown layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axes is not None:
            try:
                pairs = dict(self.axes).items()
                known = tuple((str(path), tuple(int(a) for a in axes)) for path, axes in pairs)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{type(self).__name__}: `axes` must be a dict from variable path to a list of "
                    f"axes, such as unit_axes(model), but is {self.axes!r}."
                ) from error
            object.__setattr__(self, "axes", known)
            object.__setattr__(self, "has_rules", True)  # by path

    def check_variables(self, variables: Sequence[keras.Variable]) -> None:
        """Raises a ValueError if `axes` names an axis that a variable does not have."""
        super().check_variables(variables)
        given = dict(self.axes or ())
        for variable in variables:
            rank, axes = len(variable.shape), given.get(path_of(variable), ())
            if any(not 0 <= a < rank for a in axes) or len(set(axes)) < len(axes):
                raise ValueError(
                    f"{type(self).__name__}: `axes` gives {list(axes)} for "
                    f"{path_of(variable)!r}, which has {rank} dimensions. Name each axis once, "
                    f"from 0 to {rank - 1}."
                )

    def get_config(self) -> Config:
        """The JSON-able arguments."""
        config = super().get_config()
        if self.axes is not None:
            config["axes"] = {path: list(axes) for path, axes in self.axes}
        return config

    def __str__(self) -> str:
        if self.axes is None:
            return super().__str__()
        rest = str(self.with_hyperparameters({"axes": None})).removesuffix(")")
        return f"{rest}, axes of {len(self.axes)} variables)"


@register("adaptive")
@dataclasses.dataclass(frozen=True)
class AdaptiveClip(ByUnit):
    """Adaptive gradient clipping (AGC): no unit's gradient outgrows its weights.

    g'_u = g_u · min(1, λ·max(‖W_u‖, ε)/‖g_u‖) for each unit u. A unit is what makes one output:
    a column of a Dense kernel, a filter of a convolution.

    When to use it: large batches and networks without batch normalisation. Leave out the final
    layer: `ClipMap({"head/.*": None}, default=AdaptiveClip(0.01))`. Suggested: λ from 0.01 (batch
    4096) to 0.16 (batch 256), ε = 1e-3. Source: Brock et al., "High-Performance Large-Scale Image
    Recognition Without Normalization", arXiv 2102.06171, equation 3; the same as
    `optax.adaptive_grad_clip` and timm's `adaptive_clip_grad` where they agree on the axes.

    The layer of a variable determines its units: Keras's layers, their subclasses and recurrent
    cells are known. For other variables they are guessed from path and shape:

    | rank | variable | axes |
    |---|---|---|
    | any | all dimensions but one are 1; names with "bias" | all: one unit |
    | 2 | Dense, recurrent kernel (in, out) | 0 |
    | 2 | `embeddings` (vocabulary, dim) | 1: a unit is a row |
    | 3 | `query`, `key`, `value` of attention (in, heads, dim) | 0 |
    | 3 | `attention_output` (heads, dim, out) | 0, 1 |
    | 3, 4, 5 | Conv1D, Conv2D, Conv3D (..., in, out) | all but the last |
    | 3, 4, 5 | `...transpose...` layers (..., out, in) | all but the last but one |
    | 3, 4 | `...depthwise...` layers, variables (..., in, multiplier) | all but the last two |
    | other | | all but the last |

    With more than two axes a guess may be wrong: then a warning is given, and `axes` corrects it.

    Args:
        clip_factor: λ, a positive number or a LearningRateSchedule.
        eps: ε, the floor of a unit's weight norm, so that zero-initialised units can move.
        axes: a dict from variable path to the axes that a unit spans; overrides the layers.

    Raises:
        ValueError: λ or ε not above 0, or axes that a variable does not have.
    """

    clip_factor: Threshold = parameter(
        0.01,
        help="λ, the largest share of its weights' norm that a unit's gradient may have",
        range=(0.01, 0.16),
        log=True,
        live=True,
        threshold=True,
    )
    eps: float = parameter(1e-3, help="ε, floor of a unit's weight norm")
    axes: Axes = parameter(None, help="variable path to the axes of a unit, see unit_axes")
    scope = "unit"
    measures: ClassVar[str | None] = "unit_ratio"
    card: ClassVar[Card | None] = Card(
        "each unit's norm at most λ·max(‖W‖, ε)",
        "large batches, no batch normalisation; leave out the final layer",
        "λ from 0.01 (batch 4096) to 0.16 (batch 256); ε = 1e-3",
        "Brock et al., 2102.06171",
    )

    def limit(self, weight: Weight, hyper: Hyper) -> Tensor:
        """λ·max(‖W_u‖, ε)."""
        return hyper["clip_factor"] * ops.maximum(weight.norm, self.eps)


#: Relative tolerance: a larger change of the learning rate means that it was set.
SAME_RATE = 1e-5


@register("update_ratio")
@dataclasses.dataclass(frozen=True)
class UpdateRatioClip(ByUnit):
    """No step moves a unit by more than a share of its own norm, at any learning rate.

    g' = g · min(1, κ·max(‖W‖, ε)/(η·‖g‖)), η the optimizer's learning rate at this step. A bias
    b_u has the limit of its unit: |g'_u| at most κ·max(‖W_u‖, ε)/η (see `biases`). With any
    optimizer but SGD, which ignores the gradient's scale, the gradient is not clipped; instead the
    weight update ΔW, before decoupled weight decay, becomes ΔW·min(1, κ·max(‖W‖, ε)/‖ΔW‖).

    When to use it: if a good learning rate is not known, or the network has no batch
    normalisation: κ is dimensionless and independent of η. SGD's momentum μ may add up steps of
    one direction to 1/(1 − μ) of one; κ does not account for μ. Called without an optimizer,
    `clipper(grads, variables)`, η is 1. Source: this library; the clip of LARC applied by the unit,
    with LARS's ratio as a bound (You et al., arXiv 1708.03888), or AGC (arXiv 2102.06171) with
    λ = κ/η.

    Args:
        max_ratio: κ, a positive number or a LearningRateSchedule.
        eps: ε, the floor of the weight's norm, so that zero-initialised weights can move.
        scope: the scope of one norm: "unit", the weights of one output, as in `AdaptiveClip`;
            "variable", a kernel; "layer", all kernels of a layer.
        biases: "unit" limits each by its unit in the layer's kernel (in recurrent layers the
            recurrent kernel; for a GRU's bias of two rows either kernel), and warns of biases
            without a limit because their kernel is not trained, and of other vectors without a
            kernel; None does not limit biases. γ and β of a normalisation and the slopes of PReLU
            are never limited.
        anneal: None keeps κ; "learning_rate" uses κ·η/η_max, so that updates vanish at the end of
            a schedule. η_max is the largest learning rate since it was last set (except by a
            schedule, LearningRateScheduler or ReduceLROnPlateau) or since
            `optimizer.reset_clip_state()`.
        axes: as in `AdaptiveClip`.

    Raises:
        ValueError: κ or ε not above 0, an unknown word, or axes that a variable does not have.
    """

    max_ratio: Threshold = parameter(
        2e-3,
        help="κ, the largest share of its weights' norm that a step may move",
        range=(5e-4, 1e-2),
        log=True,
        live=True,
        threshold=True,
    )
    eps: float = parameter(1e-3, help="ε, floor of the weights' norm")
    scope: str = parameter(
        "unit", help="what one norm is taken over", choices=("unit", "variable", "layer")
    )
    biases: str | None = parameter(
        "unit",
        help="unit: a bias moves no further than its unit may",
        choices=("unit", None),
        search=True,
    )
    anneal: str | None = parameter(
        None,
        help="learning_rate: κ falls with it, from its largest value so far",
        choices=(None, "learning_rate"),
        search=True,
    )
    axes: Axes = parameter(None, help="variable path to the axes of a unit, see unit_axes")
    stage = "update"
    measures: ClassVar[str | None] = "unit_step"
    card: ClassVar[Card | None] = Card(
        "no step moves a unit by more than κ of its own norm: ‖η·g‖ at most κ·max(‖W‖, ε)",
        "a learning rate that is not known well, no batch normalisation",
        "κ = 2e-3; ε = 1e-3",
        "this library; relatives: LARC, LARS (1708.03888), AGC",
    )

    def memory(self, scopes: int) -> dict[str, object]:
        """The largest learning rate so far, and the present rate as a share of it."""
        if self.anneal is None:
            return {}
        return {"largest_rate": np.zeros((), "float32"), "share": np.ones((), "float32")}

    def advance(self, state: State, hyper: Hyper) -> tuple[State, Hyper]:
        """Replaces κ by κ·η/η_max."""
        rate = hyper["learning_rate"]
        is_set = hyper.get(RATE_IS_SET)
        state = _annealed(_largest(state, rate) if is_set else state["largest_rate"], rate)
        return state, {**hyper, "max_ratio": hyper["max_ratio"] * state["share"]}

    def scheduled(self, state: State, rate: Tensor, is_new: bool) -> State:
        """See `Limit`; only a new schedule begins a new phase."""
        return _annealed(ops.zeros(()) if is_new else state["largest_rate"], rate)

    def limit(self, weight: Weight, hyper: Hyper) -> Tensor:
        """The limit κ·max(‖W‖, ε) of the weight update."""
        return hyper["max_ratio"] * ops.maximum(weight.norm, self.eps)


def _largest(state: State, rate: Tensor) -> Tensor:
    """The largest learning rate so far; 0 if somebody has set the rate since."""
    last = state["largest_rate"] * state["share"]
    is_new = ops.abs(rate - last) > SAME_RATE * ops.maximum(rate, last)
    return ops.where(is_new, ops.zeros_like(last), state["largest_rate"])


def _annealed(largest: Tensor, rate: Tensor) -> State:
    largest = ops.maximum(largest, rate)
    share = ops.where(largest > 0, rate / ops.maximum(largest, arithmetic.TINY), 1.0)
    return {"largest_rate": largest, "share": share}
