"""Clippers that measure a gradient by the weights that it will move: AGC, update ratio."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from keras import ops

from keras_gradclip import _kernels as kernels
from keras_gradclip._deferred import Deferred, defer
from keras_gradclip._names import layers_of, path_of, size_of
from keras_gradclip._types import Gradient, Hyper, State, Tensor, Threshold, Variable
from keras_gradclip.clippers._declaration import Card, parameter
from keras_gradclip.clippers._units import (
    BESIDE_KERNEL,
    BIAS,
    BOUNDS,
    KERNEL,
    Unit,
    kernels_of_biases,
    limit_of,
    limits_of_bias,
    norm_and_limit,
    number_of_units,
    rule_over,
    squares_of_units,
    unit_factors,
    unit_squares,
    units_of,
)
from keras_gradclip.clippers.base import (
    GRADIENTS,
    LEARNING_RATE,
    PASS,
    RATE_IS_SET,
    STEPS,
    Clipper,
    ClipStats,
    register,
)


class ByUnit(Clipper):
    """A clipper that goes by units, with `axes` for those that no layer tells of."""

    axes: Threshold

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

    def check_variables(self, variables):
        """Raise a ValueError if `axes` names an axis that a variable does not have."""
        super().check_variables(variables)
        for variable, unit in zip(variables, self._units_of(variables), strict=True):
            rank, axes = len(variable.shape), unit.axes
            if any(not 0 <= a < rank for a in axes) or len(set(axes)) < len(axes):
                raise ValueError(
                    f"{type(self).__name__}: `axes` gives {list(axes)} for "
                    f"{path_of(variable)!r}, which has {rank} dimensions. Name each axis once, "
                    f"from 0 to {rank - 1}."
                )

    def _units_of(self, variables: Sequence[Variable]) -> list[Unit]:
        """For each variable what one unit of it is: `axes`, its layer, or a guess."""
        given = dict(self.axes or ())
        units = units_of(variables)
        for i, variable in enumerate(variables if given else ()):
            axes = given.get(path_of(variable))
            if axes is not None and axes != units[i].axes:
                is_one = len(axes) == len(variable.shape)
                kind = units[i].kind if is_one else KERNEL
                units[i] = Unit(kind, axes, units[i].kernels, None, is_known=True)
        return units

    def remarks(self, variables):
        """See `Clipper`: units that had to be guessed; those of a matrix are its columns."""
        return [
            ""
            if unit.is_known or unit.kind != KERNEL or sum(int(d) != 1 for d in v.shape) < 3
            else f"units over the axes {unit.axes}: a guess, pass `axes`"
            for v, unit in zip(variables, self._units_of(variables), strict=True)
        ]

    def get_config(self):
        """The arguments, JSON-able."""
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

    What a unit is, the layer of a variable says, whatever its name: Keras's layers, subclasses of
    them and recurrent cells are known. Of other variables it is guessed, by path and shape:

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

    Of more than two axes a guess may be wrong: it is warned of once, and `axes` puts it right.

    Args:
        clip_factor: λ, a positive number or a LearningRateSchedule.
        eps: ε, the floor of a unit's weight norm, so that zero-initialised units can move.
        axes: a dict from variable path to the axes that a unit spans, before what layers say.

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
    defers: ClassVar[bool] = True
    card: ClassVar[Card | None] = Card(
        "each unit's norm at most λ·max(‖W‖, ε)",
        "large batches, no batch normalisation; leave out the final layer",
        "λ from 0.01 (batch 4096) to 0.16 (batch 256); ε = 1e-3",
        "Brock et al., 2102.06171",
    )

    def apply(self, grads, variables, state, hyper):
        """Clip unit by unit: see `Clipper.apply`."""
        clipped: list[Gradient | Deferred] = [None] * len(grads)
        squares: list[Tensor] = [None] * len(grads)
        axes = [unit.axes for unit in self._units_of(variables)]
        units = [number_of_units(v, a) for v, a in zip(variables, axes, strict=True)]
        share = hyper["clip_factor"]
        now = []
        for i, g in enumerate(grads):
            clipped[i] = None if g is None else self._deferred(g, variables[i], axes[i], hyper)
            if g is not None and clipped[i] is None:
                now.append(i)
        steps, weights = squares_of_units(grads, variables, axes, now)
        sizes = {i: size_of(variables[i]) for i in now}
        factors = unit_factors(steps, weights, sizes, share, self.eps)
        for i in now:
            y = kernels.scale(kernels.values(grads[i]), factors[i])
            clipped[i] = kernels.with_values(grads[i], y)
            squares[i] = ops.sum(steps[i])

        def fractions():
            result: list[Tensor] = [None] * len(grads)
            waiting = [i for i, g in enumerate(grads) if g is not None and i not in steps]
            later = squares_of_units(grads, variables, axes, waiting)
            for of_units in ((steps, weights), later):
                for i, step in of_units[0].items():
                    norm, limit = norm_and_limit(step, of_units[1][i], share, self.eps)
                    result[i] = ops.sum(kernels.float32(norm > limit)) / max(units[i], 1.0)
            return result

        return clipped, state, ClipStats(fractions, units, "norms", squares)

    def _deferred(
        self, gradient: Gradient, variable: Variable, axes: tuple[int, ...], hyper: Hyper
    ) -> Deferred | None:
        rule = rule_over(axes, len(variable.shape))
        if rule is None:
            return None
        return defer(hyper, rule, gradient, variable, hyper["clip_factor"], self.eps)


#: Relative; a learning rate that was set differs by more from the one before.
SAME_RATE = 1e-5


@register("update_ratio")
@dataclasses.dataclass(frozen=True)
class UpdateRatioClip(ByUnit):
    """No step moves a unit by more than a share of its own norm, at any learning rate.

    g' = g · min(1, κ·max(‖W‖, ε)/(η·‖g‖)), η the optimizer's learning rate at this step. Vectors
    (biases, γ, β of a normalisation) are left alone; with `biases="unit"`, a bias b_u may move by
    what its unit may: |g'_u| at most κ·max(‖W_u‖, ε)/η, W_u the unit of its layer's kernel
    (of recurrent layers the recurrent kernel's; of a GRU's bias of two rows, either kernel's).
    Biases whose kernel is not clipped with them (it is frozen, say) stay free; they are warned of.

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
    `anneal="learning_rate"` the bound falls with it: κ·η/η_max, η_max the largest learning rate of
    this phase. A phase is what a schedule makes of the rate: a LearningRateSchedule, or Keras's
    callbacks LearningRateScheduler and ReduceLROnPlateau, which lower it so that training comes to
    rest. A rate that is set in any other way (`optimizer.learning_rate = 0.01`, or another
    schedule, also by a callback of your own, such as a learning-rate range test) begins a new
    phase, with the whole of κ, and so does `optimizer.reset_clip_state()`.

    SGD's momentum may add up steps of one direction to 1/(1 − μ) of one: κ does not know μ.

    Called without an optimizer, `clipper(grads, variables)`, η is 1: the gradient is the step.

    Args:
        max_ratio: κ, a positive number or a LearningRateSchedule.
        eps: ε, the floor of the weight's norm, so that zero-initialised weights can move.
        scope: what one norm is taken over: "unit", what makes one output, as `AdaptiveClip` has
            it; "variable", a kernel; "layer", all kernels of a layer.
        biases: None leaves them alone; "unit" bounds them, too. At ten times the largest learning
            rate that plain training survives, free biases are what fails (docs/evidence.md).
        anneal: None leaves κ as it is; "learning_rate" lets it fall with the learning rate.
        axes: as of `AdaptiveClip`.

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
    axes: Threshold = parameter(None, help="variable path to the axes of a unit, see unit_axes")
    needs_learning_rate = True
    bounds_steps = True
    measures: ClassVar[str | None] = "unit_step"
    defers: ClassVar[bool] = True
    card: ClassVar[Card | None] = Card(
        "no step moves a unit by more than κ of its own norm: ‖η·g‖ at most κ·max(‖W‖, ε)",
        "a learning rate that is not known well, no batch normalisation",
        "κ = 2e-3; ε = 1e-3",
        "this library; relatives: LARC, LARS (1708.03888), AGC",
    )

    def bounded(self, variables):
        """See `Clipper`: kernels, and biases where they are."""
        units = self._units_of(variables)
        biases = self._biases(variables, variables, units)
        return [unit.is_kernel or i in biases for i, unit in enumerate(units)]

    def remarks(self, variables):
        """See `Clipper`: also biases that stay free although `biases="unit"`."""
        units = self._units_of(variables)
        biases = self._biases(variables, variables, units)
        is_free = [
            self.biases == "unit" and unit.kind == BIAS and i not in biases
            for i, unit in enumerate(units)
        ]
        return [
            "free: a bias without its kernel among the clipped variables" if free else remark
            for free, remark in zip(is_free, super().remarks(variables), strict=True)
        ]

    def init(self, variables):
        """The largest learning rate so far, and the present one's share of it."""
        if self.anneal is None:
            return {}
        return {"largest_rate": np.zeros((), "float32"), "share": np.ones((), "float32")}

    def in_its_pass(self, grads, variables, state, hyper):
        """See `Clipper`: the learning rate is told in the first pass alone, and kept."""
        clipped, new, stats = super().in_its_pass(grads, variables, state, hyper)
        if hyper.get(PASS) != GRADIENTS:
            return clipped, new, stats
        new = self._after(new, hyper)
        factor = hyper["max_ratio"] * new.get("share", 1.0)
        waiting = self._deferred(grads, variables, factor, hyper)
        units = self._units_of(variables)
        for i, of in self._biases(grads, variables, units).items():
            bias = self._beside_kernel(i, of, grads, variables, units, waiting, factor, hyper)
            if bias is not None:
                clipped[i] = bias
        for i, kernel in waiting.items():
            clipped[i] = kernel
        return clipped, new, stats

    def scheduled(self, state, rate, is_new):
        """See `Clipper`: a new phase begins with a new schedule alone."""
        if self.anneal is None:
            return state
        return _annealed(0.0 if is_new else state["largest_rate"], rate)

    def _after(self, state: State, hyper: Hyper) -> State:
        if self.anneal is None:
            return state
        rate, largest = hyper[LEARNING_RATE], state["largest_rate"]
        if hyper.get(RATE_IS_SET):
            last = largest * state["share"]
            is_new = ops.abs(rate - last) > SAME_RATE * ops.maximum(rate, last)
            largest = ops.where(is_new, ops.zeros_like(largest), largest)
        return _annealed(largest, rate)

    def apply(self, grads, variables, state, hyper):
        """Clip by the norm of each scope: see `Clipper.apply`."""
        factor, state = self._factor(state, hyper)
        units = self._units_of(variables)
        bounded = [i for i, g in enumerate(grads) if g is not None and units[i].is_kernel]
        axes = self._axes(variables, units)
        # Of the second pass, what the update has bounded on its way.
        done = {i: grads[i] for i in bounded if isinstance(grads[i], Deferred)}
        waiting = {} if done else self._deferred(grads, variables, factor, hyper)
        now = [i for i in bounded if i not in waiting and i not in done]
        steps, weights = squares_of_units(grads, variables, axes, now)
        squares = [ops.sum(steps[i]) if i in steps else None for i in range(len(grads))]
        if self.scope == "layer":
            for members in _members(variables, bounded):
                for squares_of in (steps, weights):
                    total = ops.sum(ops.stack([ops.sum(squares_of[i]) for i in members]))
                    squares_of.update(dict.fromkeys(members, total))

        clipped = [waiting.get(i, g) for i, g in enumerate(grads)]
        seen = {i: bound.seen for i, bound in done.items() if bound.rule.is_told}
        biases = self._biases(grads, variables, units)
        bounded_biases = {i for i in biases if isinstance(grads[i], Deferred)}
        for i, of in biases.items():
            if i in bounded_biases:
                continue
            clipped[i] = self._beside_kernel(i, of, grads, variables, units, waiting, factor, hyper)
            if clipped[i] is None:
                limit = self._limit_of_bias(variables, units, i, of, factor, {**weights, **seen})
                clipped[i] = kernels.clip_symmetric(grads[i], limit)
        sizes = {i: size_of(variables[i]) for i in now}
        for i, unit_factor in unit_factors(steps, weights, sizes, factor, self.eps).items():
            y = kernels.scale(kernels.values(grads[i]), unit_factor)
            clipped[i] = kernels.with_values(grads[i], y)

        def fractions():
            result: list[Tensor] = [None] * len(grads)
            later = squares_of_units(grads, variables, axes, list(waiting))
            all_steps, all_weights = {**steps, **later[0]}, {**weights, **later[1], **seen}
            for i, step in all_steps.items():
                norm, limit = norm_and_limit(step, all_weights[i], factor, self.eps)
                result[i] = ops.mean(kernels.float32(norm > limit))
            for i, bound in done.items():
                result[i] = bound.fraction
            for i, of in biases.items():
                if i in bounded_biases:
                    result[i] = grads[i].fraction
                    continue
                limit = self._limit_of_bias(variables, units, i, of, factor, all_weights)
                result[i] = ops.mean(kernels.float32(ops.abs(kernels.float32(grads[i])) > limit))
            return result

        shares = self._shares(variables, axes, bounded, list(biases))
        return clipped, state, ClipStats(fractions, shares, "norms", squares)

    def _factor(self, state: State, hyper: Hyper) -> tuple[Tensor, State]:
        """κ over the learning rate, or what stands for it; and the new state."""
        if hyper.get(PASS) == STEPS:
            return hyper["max_ratio"] * state.get("share", 1.0), state  # the rate is in the steps
        state = self._after(state, hyper)
        rate = state.get("largest_rate", hyper[LEARNING_RATE])
        return hyper["max_ratio"] / ops.maximum(rate, kernels.TINY), state

    def _shares(
        self,
        variables: Sequence[Variable],
        axes: Sequence[Sequence[int]],
        bounded: Sequence[int],
        biases: Sequence[int],
    ) -> list[float]:
        """How much each variable counts: its number of norms."""
        shares = [0.0] * len(variables)
        for i in bounded:
            shares[i] = number_of_units(variables[i], axes[i])
        if self.scope == "layer":
            for members in _members(variables, bounded):
                shares = [1.0 / len(members) if i in members else s for i, s in enumerate(shares)]
        for i in biases:
            shares[i] = number_of_units(variables[i], ()) if self.scope == "unit" else 1.0
        return shares

    def _biases(
        self, grads: Sequence[Gradient], variables: Sequence[Variable], units: Sequence[Unit]
    ) -> dict[int, list[int]]:
        """Position of each bias that is bounded to those of its kernels."""
        return kernels_of_biases(grads, variables, units) if self.biases == "unit" else {}

    def _beside_kernel(
        self,
        bias: int,
        of: Sequence[int],
        grads: Sequence[Gradient],
        variables: Sequence[Variable],
        units: Sequence[Unit],
        waiting: dict[int, Deferred],
        factor: Tensor,
        hyper: Hyper,
    ) -> Deferred | None:
        """A bias that is clipped after its kernel, which tells the norms of its units then."""
        kernel = waiting.get(of[0]) if len(of) == 1 and self.scope == "unit" else None
        if kernel is None or units[bias].letters:
            return None
        rule = BOUNDS[BESIDE_KERNEL] if hyper.get(PASS) == GRADIENTS else BESIDE_KERNEL
        return defer(hyper, rule, grads[bias], variables[bias], kernel, factor, self.eps)

    def _limit_of_bias(
        self,
        variables: Sequence[Variable],
        units: Sequence[Unit],
        bias: int,
        of: Sequence[int],
        factor: Tensor,
        known: dict[int, Tensor],
    ) -> Tensor:
        """What each element of a bias may be at most; `known`: squared norms of kernels' units."""
        limits = []
        for k in of:
            square = known.get(k) if self.scope == "unit" else None
            if square is None:
                square = unit_squares(ops.convert_to_tensor(variables[k]), units[k].axes)
            limits.append(limit_of(square, factor, self.eps))
        return limits_of_bias(units[bias], variables[bias].shape, limits)

    def _deferred(
        self,
        grads: Sequence[Gradient],
        variables: Sequence[Variable],
        factor: Tensor,
        hyper: Hyper,
    ) -> dict[int, Deferred]:
        """Position to what may wait for the update: the clip, or the bound of its step."""
        result: dict[int, Deferred] = {}
        bounds = hyper.get(PASS) == GRADIENTS
        # A bias wants its kernel's units as they were, of which only the rule by units tells.
        if self.scope == "layer" or (bounds and self.biases and self.scope != "unit"):
            return result
        units = self._units_of(variables)
        axes = self._axes(variables, units)
        for i, (g, variable) in enumerate(zip(grads, variables, strict=True)):
            rule = None
            if g is not None and units[i].is_kernel:
                rule = rule_over(axes[i], len(variable.shape))
            if rule is not None and bounds:
                rule = BOUNDS[rule]
            waiting = rule and defer(hyper, rule, g, variable, factor, self.eps)
            if waiting:
                result[i] = waiting
        return result

    def _axes(self, variables: Sequence[Variable], units: Sequence[Unit]) -> list[tuple[int, ...]]:
        """For each variable the axes of one norm."""
        if self.scope == "unit":
            return [unit.axes for unit in units]
        return [tuple(range(len(variable.shape))) for variable in variables]


def _annealed(largest: Tensor, rate: Tensor) -> State:
    largest = ops.maximum(largest, rate)
    share = ops.where(largest > 0, rate / ops.maximum(largest, kernels.TINY), 1.0)
    return {"largest_rate": largest, "share": share}


def _members(variables: Sequence[Variable], of: Sequence[int]) -> list[list[int]]:
    """The positions `of` variables, layer by layer."""
    layers: dict[str, list[int]] = {}
    for i, layer in enumerate(layers_of(variables)):
        if i in of:
            layers.setdefault(layer, []).append(i)
    return list(layers.values())
