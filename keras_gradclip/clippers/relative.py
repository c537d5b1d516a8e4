"""Clippers that measure a gradient by the weights that it will move: AGC, update ratio."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import keras
import numpy as np
from keras import ops

from keras_gradclip import _compat
from keras_gradclip import _kernels as kernels
from keras_gradclip._names import layers_of, path_of
from keras_gradclip._types import Gradient, Hyper, Model, State, Tensor, Threshold, Variable
from keras_gradclip.clippers._declaration import Card, parameter
from keras_gradclip.clippers.base import (
    GRADIENTS,
    LEARNING_RATE,
    PASS,
    STEPS,
    Clipper,
    ClipStats,
    register,
    shown,
)


@register("adaptive")
@dataclasses.dataclass(frozen=True)
class AdaptiveClip(Clipper):
    """Adaptive gradient clipping (AGC): no unit's gradient outgrows its weights.

    g'_u = g_u · min(1, λ·max(‖W_u‖, ε)/‖g_u‖) for each unit u. A unit is what makes one output:
    a column of a Dense kernel, a filter of a convolution.

    When to use it: large batches and networks without batch normalisation. Leave out the final
    layer: `ClipMap({"head/.*": None}, default=AdaptiveClip(0.01))`. Suggested: λ from 0.01 (batch
    4096) to 0.16 (batch 256), ε = 1e-3. Source: Brock et al., "High-Performance Large-Scale Image
    Recognition Without Normalization", arXiv 2102.06171, equation 3; the same as
    `optax.adaptive_grad_clip` and timm's `adaptive_clip_grad` where they agree on the axes.

    The axes over which a unit's norm is taken, by the variable's path and shape:

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

    Shapes alone cannot tell a transposed convolution from an ordinary one, so renamed layers and
    EinsumDense need `axes=unit_axes(model)`, which asks the layers themselves.

    Args:
        clip_factor: λ, a positive number or a LearningRateSchedule.
        eps: ε, the floor of a unit's weight norm, so that zero-initialised units can move.
        axes: a dict from variable path to the axes to reduce, for variables to which the table
            does not apply, e.g. `unit_axes(model)`.

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
    axes: Threshold = parameter(None, help="variable path to the axes of a unit, see unit_axes")
    measures: ClassVar[str | None] = "unit_ratio"
    card: ClassVar[Card | None] = Card(
        "each unit's norm at most λ·max(‖W‖, ε)",
        "large batches, no batch normalisation; leave out the final layer",
        "λ from 0.01 (batch 4096) to 0.16 (batch 256); ε = 1e-3",
        "Brock et al., 2102.06171",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axes is not None:
            try:
                pairs = dict(self.axes).items()
                known = tuple((str(path), tuple(int(a) for a in axes)) for path, axes in pairs)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    "AdaptiveClip: `axes` must be a dict from variable path to a list of axes, "
                    f"such as unit_axes(model), but is {self.axes!r}."
                ) from error
            object.__setattr__(self, "axes", known)

    def check_variables(self, variables):
        """Raise a ValueError if `axes` names an axis that a variable does not have."""
        super().check_variables(variables)
        for variable in variables:
            rank = len(variable.shape)
            axes = self._axes_of(variable)
            if any(not 0 <= a < rank for a in axes) or len(set(axes)) < len(axes):
                raise ValueError(
                    f"AdaptiveClip: `axes` gives {list(axes)} for {path_of(variable)!r}, which has "
                    f"{rank} dimensions. Name each axis once, from 0 to {rank - 1}."
                )

    def apply(self, grads, variables, state, hyper):
        """Clip unit by unit: see `Clipper.apply`."""
        clipped, squares = ([None] * len(grads) for _ in range(2))
        norms: list[Tensor] = [None] * len(grads)
        units: list[float] = []
        for i, (g, variable) in enumerate(zip(grads, variables, strict=True)):
            axes = self._axes_of(variable)
            units.append(_number_of_units(variable, axes))
            if g is None:
                continue
            x = kernels.values(g)
            weight = (  # a sparse gradient's rows are whole units unless axis 0 is reduced
                ops.convert_to_tensor(variable)
                if 0 in axes
                else kernels.matching_weight(variable, g)
            )
            square = unit_squares(x, axes)
            norm = ops.sqrt(square)
            floor = ops.maximum(ops.sqrt(unit_squares(weight, axes)), self.eps)
            limit = hyper["clip_factor"] * floor
            y = kernels.scale(x, kernels.clip_factor(norm, limit))
            clipped[i] = kernels.with_values(g, y)
            squares[i], norms[i] = ops.sum(square), (norm, limit)

        def fractions():
            return [
                None if pair is None else ops.sum(kernels.float32(pair[0] > pair[1])) / max(n, 1.0)
                for pair, n in zip(norms, units, strict=True)
            ]

        return clipped, state, ClipStats(fractions, units, "norms", squares)

    def _axes_of(self, variable: Variable) -> tuple[int, ...]:
        known = dict(self.axes or ()).get(path_of(variable))
        return default_unit_axes(variable) if known is None else known

    def get_config(self):
        """The arguments, JSON-able."""
        config = super().get_config()
        if self.axes is not None:
            config["axes"] = {path: list(axes) for path, axes in self.axes}
        return config

    def __str__(self) -> str:
        axes = "" if self.axes is None else f", axes of {len(self.axes)} variables"
        return f"AdaptiveClip(clip_factor={shown(self.clip_factor)}, eps={self.eps:g}{axes})"


def _number_of_units(variable: Variable, axes: Sequence[int]) -> float:
    return float(math.prod(int(d) for axis, d in enumerate(variable.shape) if axis not in axes))


def unit_squares(x: Tensor, axes: Sequence[int]) -> Tensor:
    """The sum of x² over `axes`, which stay as dimensions of 1; float32."""
    if len(axes) == len(x.shape) - 1 and tuple(axes) == tuple(range(len(axes))):
        return kernels.column_squares(x)
    if len(axes) == len(x.shape):
        return ops.reshape(kernels.sum_of_squares(x), (1,) * len(axes))
    square = ops.square(kernels.float32(x))
    return ops.sum(square, axis=tuple(axes), keepdims=True) if axes else square


def default_unit_axes(variable: Variable) -> tuple[int, ...]:
    """The axes that a unit of `variable` spans, as `AdaptiveClip`'s table says."""
    shape = tuple(int(d) for d in variable.shape)
    rank = len(shape)
    layer, _, name = path_of(variable).rpartition("/")
    layer = layer.rpartition("/")[2]
    if sum(d != 1 for d in shape) <= 1 or "bias" in name:
        return tuple(range(rank))
    if name == "embeddings":
        return (rank - 1,)
    if rank >= 3 and ("depthwise" in name or ("depthwise" in layer and name == "kernel")):
        return tuple(range(rank - 2))
    if rank >= 3 and "transpose" in layer:
        return (*range(rank - 2), rank - 1)
    if rank == 3 and layer in ("query", "key", "value"):
        return (0,)
    return tuple(range(rank - 1))


def unit_axes(model: Model) -> dict[str, tuple[int, ...]]:
    """For each kernel of a model, the axes that one unit spans, asked of the layers.

    Args:
        model: a built `keras.Model` or layer.

    Returns:
        A dict from `variable.path` to a tuple of axes, for `AdaptiveClip(axes=...)`: every
        trainable variable with more than one dimension.

    Raises:
        ValueError: the model has no trainable variables yet.
    """
    if not model.trainable_variables:
        raise ValueError(
            "unit_axes: `model` has no trainable variables. Build it first, e.g. by calling it on "
            "a batch."
        )
    result = {
        path_of(v): default_unit_axes(v) for v in model.trainable_variables if len(v.shape) > 1
    }
    layers = keras.layers
    transposes = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
    convolutions = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
    for layer in _compat.all_layers(model):
        kernel = getattr(layer, "kernel", None) if layer.trainable_variables else None
        if kernel is None or path_of(kernel) not in result:
            continue
        rank = len(kernel.shape)
        if sum(int(d) != 1 for d in kernel.shape) <= 1:
            axes = tuple(range(rank))
        elif isinstance(layer, layers.EinsumDense):
            axes = _contracted(layer.equation)
        elif isinstance(layer, transposes):
            axes = (*range(rank - 2), rank - 1)
        elif isinstance(layer, (layers.DepthwiseConv1D, layers.DepthwiseConv2D)):
            axes = tuple(range(rank - 2))
        elif isinstance(layer, (*convolutions, layers.Dense)):
            axes = tuple(range(rank - 1))
        else:
            continue
        result[path_of(kernel)] = axes
    return result


def _contracted(equation: str) -> tuple[int, ...]:
    """The axes of an EinsumDense kernel over which its equation sums."""
    inputs, output = equation.replace(" ", "").replace("...", "").split("->")
    kernel = inputs.split(",")[1]
    return tuple(i for i, letter in enumerate(kernel) if letter not in output)


@register("update_ratio")
@dataclasses.dataclass(frozen=True)
class UpdateRatioClip(Clipper):
    """No step moves a unit by more than a share of its own norm, at any learning rate.

    g' = g · min(1, κ·max(‖W‖, ε)/(η·‖g‖)), η the optimizer's learning rate at this step. Vectors
    (biases, γ, β of a normalisation) are left alone; with `biases="unit"`, a bias b_u may move by
    what its unit may: |g'_u| at most κ·max(‖W_u‖, ε)/η, W_u the unit of its layer's kernel. Biases
    without a kernel of as many units in their layer are left alone.

    When to use it: where the learning rate is not known well or the network has no batch
    normalisation: κ has no dimension and stays as it is when η changes. Source: this library; the
    clip of LARC applied by the unit, with LARS's ratio as a bound (You et al., arXiv 1708.03888),
    or AGC (arXiv 2102.06171) with λ = κ/η.

    Every optimizer but SGD ignores a gradient's scale, more or less (Adam and its kin, RMSprop,
    Lion, Muon), so that no clip of a gradient bounds its step. Around such a one the gradient
    passes as it is, and what is applied is bounded: the change of the weights ΔW, after the
    optimizer and before decoupled weight decay, becomes ΔW · min(1, κ·max(‖W‖, ε)/‖ΔW‖).

    A learning rate that falls makes a bounded step no smaller, until the bound does not act any
    more: a cosine schedule from ten times the usual rate never comes to rest. With
    `anneal="learning_rate"` the bound falls with it: κ·η/η_max, η_max the largest learning rate so
    far, whatever lowers it (a schedule, ReduceLROnPlateau, an assignment).

    SGD's momentum may add up steps of one direction to 1/(1 − μ) of one: κ does not know μ.

    Called without an optimizer, `clipper(grads, variables)`, η is 1: the gradient is the step.

    Args:
        max_ratio: κ, a positive number or a LearningRateSchedule.
        eps: ε, the floor of the weight's norm, so that zero-initialised weights can move.
        scope: what one norm is taken over: "unit", what makes one output, as `AdaptiveClip` has it
            (its table of axes); "variable", a kernel; "layer", all kernels of a layer.
        biases: None leaves them alone; "unit" bounds them, too. At ten times the largest learning
            rate that plain training survives, free biases are what fails (docs/evidence.md).
        anneal: None leaves κ as it is; "learning_rate" lets it fall with the learning rate.

    Raises:
        ValueError: κ or ε not above 0, or an unknown word.
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
        None,
        help="unit: a bias moves no further than its unit may",
        choices=(None, "unit"),
        search=True,
    )
    anneal: str | None = parameter(
        None,
        help="learning_rate: κ falls with it, from its largest value so far",
        choices=(None, "learning_rate"),
        search=True,
    )
    needs_learning_rate = True
    bounds_steps = True
    measures: ClassVar[str | None] = "unit_step"
    card: ClassVar[Card | None] = Card(
        "no step moves a unit by more than κ of its own norm: ‖η·g‖ at most κ·max(‖W‖, ε)",
        "a learning rate that is not known well, no batch normalisation",
        "κ = 2e-3; ε = 1e-3",
        "this library; relatives: LARC, LARS (1708.03888), AGC",
    )

    def init(self, variables):
        """The largest learning rate so far, and the present one's share of it."""
        if self.anneal is None:
            return {}
        return {"largest_rate": np.zeros((), "float32"), "share": np.ones((), "float32")}

    def in_its_pass(self, grads, variables, state, hyper):
        """See `Clipper`: the learning rate is told in the first pass alone, and kept."""
        clipped, new, stats = super().in_its_pass(grads, variables, state, hyper)
        return clipped, self._after(new, hyper) if hyper.get(PASS) == GRADIENTS else new, stats

    def _after(self, state: State, hyper: Hyper) -> State:
        if self.anneal is None:
            return state
        rate = hyper[LEARNING_RATE]
        largest = ops.maximum(state["largest_rate"], rate)
        share = ops.where(largest > 0, rate / ops.maximum(largest, kernels.TINY), 1.0)
        return {"largest_rate": largest, "share": share}

    def apply(self, grads, variables, state, hyper):
        """Clip by the norm of each scope: see `Clipper.apply`."""
        rate = hyper[LEARNING_RATE]
        if hyper.get(PASS) == STEPS:
            factor = hyper["max_ratio"] * state.get("share", 1.0)  # the rate is in the steps
        else:
            state = self._after(state, hyper)
            factor = hyper["max_ratio"] / ops.maximum(state.get("largest_rate", rate), kernels.TINY)
        bounded = [i for i, g in enumerate(grads) if g is not None and not is_vector(variables[i])]
        axes = {i: self._axes_of(variables[i]) for i in bounded}
        steps = {i: unit_squares(kernels.values(grads[i]), axes[i]) for i in bounded}
        weights = {i: unit_squares(_weight(variables[i], grads[i], axes[i]), axes[i]) for i in axes}
        squares: list[Tensor] = [None] * len(grads)
        shares = [0.0] * len(grads)
        for i in bounded:
            squares[i] = ops.sum(steps[i])
            shares[i] = _number_of_units(variables[i], axes[i])
        if self.scope == "layer":
            for members in _members(variables, bounded):
                for squares_of in (steps, weights):
                    total = ops.sum(ops.stack([ops.sum(squares_of[i]) for i in members]))
                    squares_of.update(dict.fromkeys(members, total))
                shares = [1.0 / len(members) if i in members else s for i, s in enumerate(shares)]

        clipped = list(grads)
        pairs: list[Tensor] = [None] * len(grads)
        if self.biases == "unit":
            for i, kernel in _kernels_of_biases(grads, variables):
                if self.scope == "unit" and kernel in weights:  # known already
                    square = weights[kernel]
                else:
                    axes_of = default_unit_axes(variables[kernel])
                    square = unit_squares(ops.convert_to_tensor(variables[kernel]), axes_of)
                limit = factor * ops.maximum(ops.sqrt(square), self.eps)
                limit = ops.reshape(limit, variables[i].shape)
                clipped[i] = kernels.clip_symmetric(grads[i], limit)
                pairs[i] = (ops.abs(kernels.float32(grads[i])), limit)
                shares[i] = _number_of_units(variables[i], ()) if self.scope == "unit" else 1.0
        for i in bounded:
            norm, limit = ops.sqrt(steps[i]), factor * ops.maximum(ops.sqrt(weights[i]), self.eps)
            y = kernels.scale(kernels.values(grads[i]), kernels.clip_factor(norm, limit))
            clipped[i] = kernels.with_values(grads[i], y)
            pairs[i] = (norm, limit)

        def fractions():
            return [
                None if pair is None else ops.mean(kernels.float32(pair[0] > pair[1]))
                for pair in pairs
            ]

        return clipped, state, ClipStats(fractions, shares, "norms", squares)

    def _axes_of(self, variable: Variable) -> tuple[int, ...]:
        whole = tuple(range(len(variable.shape)))
        return default_unit_axes(variable) if self.scope == "unit" else whole


def is_vector(variable: Variable) -> bool:
    """Whether a variable is a bias or a scale: of one dimension at most, or called so."""
    return len(variable.shape) <= 1 or "bias" in path_of(variable).rpartition("/")[2]


def _kernels_of_biases(
    grads: Sequence[Gradient], variables: Sequence[Variable]
) -> list[tuple[int, int]]:
    """Positions of biases, each with that of the last kernel in its layer with as many units."""
    found: dict[int, int | None] = {}
    for layer in _members(variables, range(len(variables))):
        units = {
            i: _number_of_units(variables[i], default_unit_axes(variables[i]))
            for i in layer
            if not is_vector(variables[i]) and not kernels.is_sparse(grads[i])
        }
        for i in layer:
            g = grads[i]
            if i not in units and g is not None and not kernels.is_sparse(g):
                size = math.prod(int(d) for d in variables[i].shape)
                found[i] = next((k for k, n in reversed(units.items()) if n == size), None)
    return [(i, kernel) for i, kernel in found.items() if kernel is not None]


def _weight(variable: Variable, gradient: Gradient, axes: Sequence[int]) -> Tensor:
    """The weights of the units in `gradient`; a sparse one's rows are units unless 0 is in axes."""
    if 0 in axes:
        return ops.convert_to_tensor(variable)
    return kernels.matching_weight(variable, gradient)


def _members(variables: Sequence[Variable], of: Sequence[int]) -> list[list[int]]:
    """The positions `of` variables, layer by layer."""
    layers: dict[str, list[int]] = {}
    for i, layer in enumerate(layers_of(variables)):
        if i in of:
            layers.setdefault(layer, []).append(i)
    return list(layers.values())
