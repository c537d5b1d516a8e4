"""Units, what makes one output each: their axes, their norms, and the clip that bounds them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import keras
from keras import ops

from keras_gradclip import _compat
from keras_gradclip import _kernels as kernels
from keras_gradclip._deferred import Rule
from keras_gradclip._names import path_of
from keras_gradclip._types import Gradient, Model, Tensor, Variable


def number_of_units(variable: Variable, axes: Sequence[int]) -> float:
    """How many units a variable has that span `axes`."""
    return float(math.prod(int(d) for axis, d in enumerate(variable.shape) if axis not in axes))


def unit_squares(x: Tensor, axes: Sequence[int]) -> Tensor:
    """The sum of x² over `axes`, which stay as dimensions of 1; a scalar over all; float32."""
    if len(axes) == len(x.shape):
        return kernels.sum_of_squares(x)
    if tuple(axes) == tuple(range(len(x.shape) - 1)):
        return kernels.column_squares(x)
    square = ops.square(kernels.float32(x))
    return ops.sum(square, axis=tuple(axes), keepdims=True) if axes else square


def squares_of_units(
    grads: Sequence[Gradient],
    variables: Sequence[Variable],
    axes: Sequence[Sequence[int]],
    of: Sequence[int],
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Position to the squared norms of a gradient's units, and of its weight's."""
    return (
        {i: unit_squares(kernels.values(grads[i]), axes[i]) for i in of},
        {i: unit_squares(weight_of(variables[i], grads[i], axes[i]), axes[i]) for i in of},
    )


def norm_and_limit(
    square: Tensor, weight_square: Tensor, share: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """‖g‖, and share·max(‖W‖, ε), which it may be at most."""
    return ops.sqrt(square), share * ops.maximum(ops.sqrt(weight_square), eps)


def unit_factors(
    steps: dict[int, Tensor],
    weights: dict[int, Tensor],
    sizes: dict[int, int],
    share: Tensor,
    eps: float,
) -> dict[int, Tensor]:
    """What to multiply each gradient by; small ones of one unit share their operations."""
    single = [i for i, n in sizes.items() if not len(steps[i].shape) and n < kernels.SMALL]
    result: dict[int, Tensor] = {}
    if len(single) > 1:
        squares, weight_squares = (ops.stack([of[i] for i in single]) for of in (steps, weights))
        factors = kernels.clip_factor(*norm_and_limit(squares, weight_squares, share, eps))
        result.update(zip(single, ops.unstack(factors, num=len(single)), strict=True))
    for i in steps:
        if i not in result:
            limits = norm_and_limit(steps[i], weights[i], share, eps)
            result[i] = kernels.clip_factor(*limits)
    return result


def _bound(
    squares_of: Callable[[Tensor], Tensor],
    x: Tensor,
    weight_squares: Tensor,
    share: Tensor,
    eps: Tensor,
) -> tuple[Tensor, Tensor]:
    norm, limit = norm_and_limit(squares_of(x), weight_squares, share, eps)
    fraction = ops.mean(kernels.float32(norm > limit))
    return kernels.scale(x, kernels.clip_factor(norm, limit)), fraction


def _clip(squares_of: Callable[[Tensor], Tensor], *arguments: Tensor) -> Tensor:
    return _bound(squares_of, *arguments)[0]


def _clip_bias(
    x: Tensor, seen: None, kernels_squares: Tensor, share: Tensor, eps: Tensor
) -> Tensor:
    del seen
    limit = share * ops.maximum(ops.sqrt(kernels_squares), eps)
    return kernels.clip_symmetric(x, ops.reshape(limit, x.shape))


def _rule(squares_of: Callable[[Tensor], Tensor], *, is_told: bool) -> Rule:
    clip = functools.partial(_clip, squares_of)
    return Rule(clip, sees=squares_of, is_told=is_told, takes_norms=True)


COLUMNS = _rule(kernels.column_squares, is_told=True)
WHOLE = _rule(kernels.sum_of_squares, is_told=False)
BIAS = Rule(_clip_bias, follows=True)
#: The same for the step that an update is about to take.
BOUNDS = {
    rule: dataclasses.replace(rule, clip=functools.partial(_bound, squares_of), bounds_step=True)
    for rule, squares_of in ((COLUMNS, kernels.column_squares), (WHOLE, kernels.sum_of_squares))
}


def rule_over(axes: Sequence[int], rank: int) -> Rule | None:
    """The rule for units over `axes`; None where XLA would be slow: the last axis is reduced."""
    if rank > 1 and tuple(axes) == tuple(range(rank - 1)):
        return COLUMNS
    return WHOLE if len(axes) == rank else None


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


def weight_of(variable: Variable, gradient: Gradient, axes: Sequence[int]) -> Tensor:
    """The weights of the units in `gradient`; a sparse one's rows are units unless 0 is in axes."""
    if 0 in axes:
        return ops.convert_to_tensor(variable)
    return kernels.matching_weight(variable, gradient)
