"""Enforcement of limits: the one place of the library that clips.

For each clipper: take norms over its scope, ask it for the limit, clip, rescale, and count what was
clipped. Gradients may be dense, sparse or None, of any float dtype, and hold infinities.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import keras
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip._types import Gradient, Hyper, Scalar, State, Tensor, Threshold
from keras_gradclip.clippers.units import (
    BIAS,
    KERNEL,
    Unit,
    kernels_of_biases,
    norms_for_bias,
    number_of_units,
    units_of,
    with_axes,
)
from keras_gradclip.names import SCOPES, scope_numbers, size_of

#: Keys of `hyper`: the optimizer's learning rate, and whether it is a variable that is set, and
#: no schedule.
LEARNING_RATE, RATE_IS_SET = "learning_rate", "rate_is_set"
#: Stands for "no limit": an infinity would turn into NaN when divided.
NO_LIMIT = 1e38


class ClipStats(NamedTuple):
    """What a clip did, one entry a variable, in the order of the variables.

    Attributes:
        fractions: a function that returns a list of float32 scalars in 0..1, the share of the
            variable's elements (or norms) that were clipped; None where no rule applies. A
            function, because it costs operations that most updates do not need.
        weights: a list of floats, how much each variable counts in the overall fraction: its
            number of elements, or its share of a norm.
        unit: "elements" or "norms", what was counted.
        square_norms: a list of float32 scalars, the squared L2 norm before the clip, where it
            was computed anyway; else None.
    """

    fractions: Callable[[], list[Tensor | None]]
    weights: list[float]
    unit: str
    square_norms: list[Tensor | None] | None = None


class Weight:
    """The weights that one limit is about: those of a unit, a variable, a layer, or the model.

    Args:
        read: for each variable in the scope a function that returns its weight.
        size: the number of elements.
        axes: of units, the axes that one unit spans; None: all.
        norm: the norms, where they are known.
        rows: of a sparse gradient, a function that returns the rows that the gradient has.
    """

    def __init__(
        self,
        read: Sequence[Callable[[], Tensor]] = (),
        size: int = 0,
        axes: Sequence[int] | None = None,
        norm: Tensor | None = None,
        rows: Callable[[], Tensor] | None = None,
    ) -> None:
        self._read, self._axes, self._norm, self._rows = read, axes, norm, rows
        #: The number of elements.
        self.size = size

    @property
    def values(self) -> Tensor:
        """The weight itself; of a sparse gradient, the rows that the gradient has."""
        return self._read[0]() if self._rows is None else self._rows()

    @property
    def norm(self) -> Tensor:
        """The L2 norm, a float32 scalar; of units, one each, broadcastable to `values`."""
        if self._norm is None:
            weights = [read() for read in self._read]
            squares = [arithmetic.unit_squares(w, self._axes) for w in weights]
            self._norm = ops.minimum(ops.sqrt(_total(squares)), arithmetic.LARGEST)
        return self._norm

    @property
    def rms(self) -> Tensor:
        """The root mean square, a float32 scalar."""
        return self.norm / math.sqrt(max(self.size, 1))


class Assignment(NamedTuple):
    """One clipper and the variables that it limits.

    Attributes:
        name: what its hyper-parameters and its state are prefixed with, ending in "/"; "" of a
            clipper by itself.
        clipper: the clipper; not a `ClipMap` or a `Chain`.
        members: positions of the variables.
        calls_apply: the clipper has an `apply` of its own, which is called instead of a limit
            being enforced.
    """

    name: str
    clipper: Limit
    members: tuple[int, ...]
    calls_apply: bool = False


class Limit:
    """A limit on the size of gradients, or of weight updates; without a limit, an `apply`.

    The class attributes may be fields of a dataclass as well.
    """

    #: What one limit is about: "element", "unit" (what makes one output of a kernel), "variable",
    #: "layer" or "global". A field or a class attribute.
    scope: str = "element"
    #: "gradient", or "update": the limit holds for the change of the weights that the inner
    #: optimizer computes. For SGD, whose update is η·g, that is a limit of limit/η on the gradient.
    stage: str = "gradient"
    #: What biases and scales are limited by: "own", like any other variable; "unit", each element
    #: by the norm of its unit in the layer's kernel; None, nothing.
    biases: str | None = "own"
    #: What is given back after the clip: None, "norm", "max" or "alpha". A field or an attribute.
    rescale: str | None = None
    #: The axes of units, by path of the variable; () to ask the layers.
    axes: Sequence[tuple[str, tuple[int, ...]]] | None = None
    #: Whether it needs `hyper["learning_rate"]`.
    needs_learning_rate: bool = False

    def hyperparameters(self) -> Mapping[str, Threshold]:
        """The live hyper-parameters: name to float or LearningRateSchedule."""
        return {}

    def init(self, variables: Sequence[keras.Variable]) -> dict[str, object]:
        """The running state before the first update, of a clipper with an `apply` of its own."""
        del variables
        return {}

    def apply(
        self,
        grads: Sequence[Gradient],
        variables: Sequence[keras.Variable],
        state: State,
        hyper: Hyper,
    ) -> tuple[list[Gradient], State, ClipStats]:
        """The clip of a clipper that is no limit."""
        raise NotImplementedError(f"{type(self).__name__} has no `apply`")

    def limit(self, weight: Weight, hyper: Hyper) -> Tensor:
        """The largest element (or L2 norm) that is allowed.

        Args:
            weight: the weights of the scope.
            hyper: the values of `hyperparameters()` at this update, as float32 scalars, and
                "learning_rate".

        Returns:
            A float32 scalar, or a tensor that broadcasts to the gradient (or to `weight.norm`).
        """
        raise NotImplementedError(f"{type(self).__name__} has neither `limit` nor `limits`")

    def growth(self, weight: Weight, hyper: Hyper) -> Tensor:
        """What `rescale="alpha"` multiplies by."""
        raise NotImplementedError(f"{type(self).__name__} has no rescale='alpha'")

    def memory(self, scopes: int) -> dict[str, object]:
        """The state before the first update, for this number of scopes: name to NumPy array."""
        del scopes
        return {}

    def advance(self, state: State, hyper: Hyper) -> tuple[State, Hyper]:
        """The new state, and the values that `limit` gets: once an update."""
        return state, hyper

    def scheduled(self, state: State, rate: Tensor, is_new: bool) -> State:
        """The state after a schedule, or a new one, has set the learning rate to `rate`."""
        del rate, is_new
        return state

    def limits(
        self, norms: Tensor, usable: Tensor, state: State, hyper: Hyper
    ) -> tuple[Tensor, State]:
        """The limit of each scope, and the new state.

        Args:
            norms: float32 `[scopes]`, before the clip; 0 where `usable` is false.
            usable: boolean `[scopes]`: the norm is finite and above 0, so that it may be
                remembered. No gradient, and a gradient of zero, are no evidence.
            state: what `memory` or the last `limits` returned.
            hyper: as in `limit`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no memory")


class Enforcer:
    """Enforces limits on gradients, or on the weight updates of an inner optimizer.

    Args:
        assignments: who limits what, in the order in which they clip.
        variables: the variables, in the order of the gradients.
        update_is_scaled_gradient: the inner optimizer's update is η·g (SGD), so that a limit on
            the update is enforced on the gradient; otherwise on the updates themselves.

    Attributes:
        state: the state before the first update, name to NumPy array.
    """

    def __init__(
        self,
        assignments: Sequence[Assignment],
        variables: Sequence[keras.Variable],
        update_is_scaled_gradient: bool = True,
    ) -> None:
        self.variables = list(variables)
        self._programs = arithmetic.Programs(variables)
        self._on_gradients: list[_Enforced] = []
        self._on_updates: list[_Enforced] = []
        self.state: dict[str, object] = {}
        for assignment in assignments:
            enforced = _Enforced(assignment, self.variables, self._programs)
            late = assignment.clipper.stage == "update" and not update_is_scaled_gradient
            (self._on_updates if late else self._on_gradients).append(enforced)
            for name, value in enforced.state.items():
                self.state[enforced.name + name] = value

    @property
    def limits_updates(self) -> bool:
        """Whether there is anything to do for weight updates."""
        return bool(self._on_updates)

    def limited_updates(self) -> set[int]:
        """Positions of the variables whose update may be limited."""
        return {i for e in self._on_updates for i in (e.members if e.calls_apply else e.limited)}

    def scheduled(self, state: State, rate: Tensor, is_new: bool) -> State:
        """The state after a schedule, or a new one, has set the learning rate to `rate`."""
        new = dict(state)
        for enforced in [*self._on_gradients, *self._on_updates]:
            if not enforced.calls_apply:
                own = {name: state[enforced.name + name] for name in enforced.state}
                for name, value in enforced.clipper.scheduled(own, rate, is_new).items():
                    new[enforced.name + name] = value
        return new

    def remarks(self) -> list[str]:
        """For each variable what is unexpected about its clip, in a few words; else ""."""
        every = [enforced.remarks() for enforced in [*self._on_gradients, *self._on_updates]]
        return [
            "; ".join(remarks[i] for remarks in every if i in remarks)
            for i in range(len(self.variables))
        ]

    def clip(
        self,
        grads: Sequence[Gradient],
        state: State,
        hyper: Hyper,
        weights: Sequence[Tensor | None] | None = None,
    ) -> tuple[list[Gradient], State, ClipStats]:
        """The clipped gradients, the state that changed, and what was clipped.

        Args:
            grads: one a variable, without duplicate rows; None where there is none.
            state: of all clippers.
            hyper: of all clippers, and "learning_rate" (1 if it is missing).
            weights: None; or `grads` are weight updates, and these the weights from before them.
        """
        clipped, new_state = list(grads), {}
        stats: list[tuple[Sequence[int], ClipStats]] = []
        for enforced in self._on_gradients if weights is None else self._on_updates:
            own_state, own_stats = enforced.clip(clipped, weights, state, hyper)
            for name, value in own_state.items():
                new_state[enforced.name + name] = value
            stats.append((enforced.members, own_stats))
        return clipped, new_state, combined(stats, self.variables)


class _Enforced:
    """One clipper, with what is known of its variables before the first update."""

    def __init__(
        self,
        assignment: Assignment,
        variables: Sequence[keras.Variable],
        programs: arithmetic.Programs,
    ) -> None:
        self.name, self.clipper, self.members, self.calls_apply = assignment
        self.variables, self.programs = variables, programs
        own = [variables[i] for i in self.members]
        self.units: list[Unit] = []
        if self.calls_apply:
            self.state = self.clipper.init(own)
            return
        needs_units = self.clipper.scope == "unit" or self.clipper.biases != "own"
        units = units_of(variables) if needs_units else []
        self.units = with_axes(units, variables[: len(units)], self.clipper.axes)
        #: Positions of the variables that are limited over the clipper's scope ...
        self.in_scope = list(self.members)
        if self.clipper.biases != "own":
            self.in_scope = [i for i in self.members if self.units[i].is_kernel]
        #: ... and of biases, with those of the kernels whose units limit them by the element.
        self.by_kernel: dict[int, list[int]] = {}
        if self.clipper.biases == "unit":
            kernels = kernels_of_biases(variables, self.units)
            self.by_kernel = {i: kernels[i] for i in self.members if i in kernels}
        self.scopes: dict[int, int] = {}
        if self.clipper.scope in SCOPES:
            numbers = scope_numbers(self.clipper.scope, own)
            self.scopes = dict(zip(self.members, numbers, strict=True))
        self.limited = [*self.in_scope, *self.by_kernel]
        self.state = self.clipper.memory(max(self.scopes.values(), default=-1) + 1)

    def remarks(self) -> dict[int, str]:
        """What is unexpected about the clip of a variable, by position."""
        result: dict[int, str] = {}
        for i in self.members if self.units and not self.calls_apply else ():
            unit, shape = self.units[i], self.variables[i].shape
            if self.clipper.biases == "unit" and unit.kind == BIAS and i not in self.by_kernel:
                result[i] = "free: a bias without its kernel among the trained variables"
            elif not unit.is_known and unit.kind == KERNEL and sum(int(d) != 1 for d in shape) > 2:
                result[i] = f"units over the axes {unit.axes}: a guess, pass `axes`"
        return result

    def clip(
        self,
        grads: list[Gradient],
        weights: Sequence[Tensor | None] | None,
        state: State,
        hyper: Hyper,
    ) -> tuple[State, ClipStats]:
        """Clip `grads` in place; the clipper's new state, and what was clipped."""
        rate = hyper.get(LEARNING_RATE, 1.0)
        own_state = {name: state[self.name + name] for name in self.state}
        own_hyper = {name: hyper[self.name + name] for name in self.clipper.hyperparameters()}
        own_hyper[LEARNING_RATE] = rate
        if self.calls_apply:
            if weights is not None:
                own_hyper[LEARNING_RATE] = ops.ones((), "float32")
            variables = [self.variables[i] for i in self.members]
            clipped, own_state, stats = self.clipper.apply(
                [grads[i] for i in self.members], variables, own_state, own_hyper
            )
            for i, gradient in zip(self.members, clipped, strict=True):
                grads[i] = gradient
            return own_state, stats
        is_set = {RATE_IS_SET: True} if hyper.get(RATE_IS_SET) else {}
        own_state, advanced = self.clipper.advance(own_state, {**own_hyper, **is_set})
        values = {name: value for name, value in advanced.items() if name != RATE_IS_SET}
        divisor = rate if self.clipper.stage == "update" and weights is None else None
        clip = _Clip(self, grads, weights, values, divisor)
        if self.clipper.scope in SCOPES:
            own_state = clip.norms(own_state)
        elif self.clipper.scope == "unit":
            clip.units()
        else:
            clip.elements(self.in_scope, clip.weight_of)
        if self.by_kernel:
            clip.elements([*self.by_kernel], clip.unit_of_bias)
        return own_state, clip.stats()


class _Clip:
    """One clipper in one update: clips `grads`, a list with one entry a variable, in place."""

    def __init__(
        self,
        enforced: _Enforced,
        grads: list[Gradient],
        weights: Sequence[Tensor | None] | None,
        hyper: Hyper,
        divisor: Scalar | None,
    ) -> None:
        self.enforced, self.clipper = enforced, enforced.clipper
        self.grads, self.weights, self.hyper, self.divisor = grads, weights, hyper, divisor
        self.before = list(grads)
        self.counts: dict[int, float] = {}
        self.squares: dict[int, Tensor] = {}
        self.weight_norms: dict[int, Tensor] = {}  # of kernels' units
        self.fractions: list[Callable[[], Mapping[int, Tensor]]] = []

    def elements(self, members: Sequence[int], weight_of: Callable[[int], Weight]) -> None:
        """G' = clip(g, −L, L), then the rescale."""
        members = [i for i in members if self.grads[i] is not None]
        for i in members:
            x, weight = arithmetic.values(self.before[i]), weight_of(i)
            limit = self._limit(weight)
            costly = len(limit.shape) > 0  # a limit for each element
            if costly and weight_of == self.weight_of and self.enforced.programs.pays(x):
                y, _ = self._compiled(i, x)
            else:
                y = _clip_elements(self.clipper, x, weight, limit, self.hyper)
            self.grads[i] = arithmetic.with_values(self.before[i], y)
            self.counts[i] = float(size_of(self.enforced.variables[i]))

        def fractions() -> dict[int, Tensor]:
            xs = [arithmetic.values(self.before[i]) for i in members]
            limits = [self._limit(weight_of(i)) for i in members]
            sizes = [size_of(self.enforced.variables[i]) for i in members]
            return dict(zip(members, arithmetic.fractions_over(xs, limits, sizes), strict=True))

        self.fractions.append(fractions)

    def units(self) -> None:
        """g'_u = g_u·min(1, L_u/‖g_u‖) for each unit u."""
        members = [i for i in self.enforced.in_scope if self.grads[i] is not None]
        single: dict[int, Tensor] = {}  # small ones of one unit share their operations
        for i in members:
            x, variable = arithmetic.values(self.before[i]), self.enforced.variables[i]
            axes = self.enforced.units[i].axes
            self.counts[i] = number_of_units(variable, axes)
            if len(axes) == len(variable.shape) and size_of(variable) < arithmetic.SMALL:
                single[i] = arithmetic.sum_of_squares(x)
                continue
            if self.enforced.programs.pays(x):
                y, self.weight_norms[i] = self._compiled(i, x)
            else:
                weight = self.weight_of(i)
                y = _clip_units(axes, x, self._limit(weight))
                self.weight_norms[i] = weight.norm
            self.grads[i] = arithmetic.with_values(self.before[i], y)
        if single:
            self.squares.update(single)
            norms = ops.sqrt(ops.stack([*single.values()]))
            weights = ops.stack([self.weight_of(i).norm for i in single])
            factors = arithmetic.clip_factor(norms, self._limit(Weight(norm=weights)))
            for i, factor in zip(single, ops.unstack(factors, num=len(single)), strict=True):
                y = arithmetic.scale(arithmetic.values(self.before[i]), factor)
                self.grads[i] = arithmetic.with_values(self.before[i], y)

        def fractions() -> dict[int, Tensor]:
            result = {}
            for i in members:
                x, axes = arithmetic.values(self.before[i]), self.enforced.units[i].axes
                norm = ops.sqrt(arithmetic.unit_squares(x, axes))
                over = ops.sum(arithmetic.float32(norm > self._limit(self.weight_of(i))))
                result[i] = over / max(self.counts[i], 1.0)
            return result

        self.fractions.append(fractions)

    def norms(self, state: State) -> State:
        """G' = g·min(1, L/‖g‖), ‖·‖ over a variable, a layer or everything; the new state."""
        members: dict[int, list[int]] = {}  # of each scope
        for i in self.enforced.in_scope:
            if self.grads[i] is not None:
                members.setdefault(self.enforced.scopes[i], []).append(i)
                self.squares[i] = arithmetic.sum_of_squares(arithmetic.values(self.before[i]))
        if not members:
            return state
        squares = {s: _total([self.squares[i] for i in of]) for s, of in members.items()}
        if type(self.clipper).limits is Limit.limits:
            weights = [self._weight_over(of) for of in members.values()]
            limits = [self._limit(weight) for weight in weights]
            sizes = [weight.size for weight in weights]
            factors = arithmetic.clip_factors([*squares.values()], limits, sizes)
        else:
            factors, state = self._factors_from_memory(squares, state)
        factor_of = dict(zip(members, factors, strict=True))
        for scope, of_scope in members.items():
            for i in of_scope:
                x = arithmetic.values(self.before[i])
                y = arithmetic.scale(x, factor_of[scope])
                y = arithmetic.rescaled(self.clipper.rescale, x, y)
                self.grads[i] = arithmetic.with_values(self.before[i], y)
                self.counts[i] = 1.0 / len(of_scope)

        def fractions() -> dict[int, Tensor]:
            hit = arithmetic.float32(ops.stack(factors) < 1.0)
            of = dict(zip(members, ops.unstack(hit, num=len(factors)), strict=True))
            return {i: of[scope] for scope, of_scope in members.items() for i in of_scope}

        self.fractions.append(fractions)
        return state

    def _factors_from_memory(
        self, squares: Mapping[int, Tensor], state: State
    ) -> tuple[list[Tensor], State]:
        """Factors by a clipper with memory, which sees all scopes at once, and the new state."""
        zero = ops.zeros((), "float32")
        number = max(self.enforced.scopes.values()) + 1
        norms = ops.sqrt(ops.stack([squares.get(s, zero) for s in range(number)]))
        usable = ops.logical_and(ops.isfinite(norms), norms > 0)
        # What is not usable must not get near the arithmetic of the memory: 0·inf is NaN.
        safe = ops.where(usable, norms, ops.zeros_like(norms))
        limits, state = self.clipper.limits(safe, usable, state, self.hyper)
        factors = arithmetic.clip_factor(
            norms, ops.clip(limits, arithmetic.TINY, arithmetic.LARGEST)
        )
        every = ops.unstack(factors, num=number)
        return [every[s] for s in squares], state

    def stats(self) -> ClipStats:
        """What was clipped, an entry a variable of the clipper."""
        members, fractions = self.enforced.members, list(self.fractions)

        def known() -> list[Tensor | None]:
            every = {i: f for function in fractions for i, f in function().items()}
            return [every.get(i) for i in members]

        unit = "elements" if self.clipper.scope == "element" else "norms"
        counts = [self.counts.get(i, 0.0) for i in members]
        return ClipStats(known, counts, unit, [self.squares.get(i) for i in members])

    def _limit(self, weight: Weight) -> Tensor:
        return _limit(self.clipper, weight, self.hyper, self.divisor)

    def _compiled(self, i: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The clip of one gradient as one program of XLA; and by units, the weight's norms."""
        clipper, size = self.clipper, size_of(self.enforced.variables[i])
        axes = self.enforced.units[i].axes if clipper.scope == "unit" else None

        def clip(
            x: Tensor, values: Tensor, hyper: Hyper, divisor: Scalar | None
        ) -> tuple[Tensor, Tensor | None]:
            weight = Weight([lambda: values], size, axes)
            limit = _limit(clipper, weight, hyper, divisor)
            if axes is None:
                return _clip_elements(clipper, x, weight, limit, hyper), None
            return _clip_units(axes, x, limit), weight.norm

        arguments = (x, self.weight_of(i).values, self.hyper, self.divisor)
        return self.enforced.programs.run((self.enforced.name, axes), clip, *arguments)

    def _read(self, i: int) -> Tensor:
        """The weight of a variable."""
        given = None if self.weights is None else self.weights[i]
        return arithmetic.read(self.enforced.variables[i]) if given is None else given

    def weight_of(self, i: int) -> Weight:
        """The weight of a variable, or its units; of a sparse gradient's rows, unless a unit
        spans rows.
        """
        size, whole = size_of(self.enforced.variables[i]), functools.partial(self._read, i)

        def rows() -> Tensor:
            return arithmetic.matching_rows(self._read(i), self.before[i])

        if self.clipper.scope != "unit":
            return Weight([whole], size, rows=rows)
        axes = self.enforced.units[i].axes
        return Weight([whole if 0 in axes else rows], size, axes)

    def unit_of_bias(self, i: int) -> Weight:
        """For each element of a bias the norm of its unit in the layer's kernel."""
        norms = []
        for k in self.enforced.by_kernel[i]:
            if k not in self.weight_norms:
                axes = self.enforced.units[k].axes
                self.weight_norms[k] = ops.sqrt(arithmetic.unit_squares(self._read(k), axes))
            norms.append(self.weight_norms[k])
        shape = self.enforced.variables[i].shape
        norm = norms_for_bias(self.enforced.units[i], shape, norms)
        return Weight(norm=arithmetic.matching_rows(norm, self.before[i]))

    def _weight_over(self, members: Sequence[int]) -> Weight:
        """The weights of all members together."""
        size = sum(size_of(self.enforced.variables[i]) for i in members)
        return Weight([functools.partial(self._read, i) for i in members], size)


def _total(squares: Sequence[Tensor]) -> Tensor:
    return squares[0] if len(squares) == 1 else ops.sum(ops.stack(squares))


def _limit(clipper: Limit, weight: Weight, hyper: Hyper, divisor: Scalar | None) -> Tensor:
    """What the clipper allows; per learning rate, where it limits the update of SGD."""
    limit = ops.convert_to_tensor(clipper.limit(weight, hyper))
    return limit if divisor is None else limit / ops.maximum(divisor, arithmetic.TINY)


def _clip_elements(
    clipper: Limit, x: Tensor, weight: Weight, limit: Tensor, hyper: Hyper
) -> Tensor:
    y = arithmetic.clip_symmetric(x, limit)
    if clipper.rescale == "alpha":
        return arithmetic.scale(y, clipper.growth(weight, hyper))
    return arithmetic.rescaled(clipper.rescale, x, y)


def _clip_units(axes: Sequence[int], x: Tensor, limit: Tensor) -> Tensor:
    norm = ops.sqrt(arithmetic.unit_squares(x, axes))
    return arithmetic.scale(x, arithmetic.clip_factor(norm, limit))


def combined(
    stats: Sequence[tuple[Sequence[int], ClipStats]], variables: Sequence[keras.Variable]
) -> ClipStats:
    """What several rules did together, each with the positions of its variables.

    Of a variable that several rules clip, the largest fraction counts. Where some rules count
    elements and others norms, a norm counts as all its elements.
    """
    mixed = len({s.unit for _, s in stats}) > 1
    weights = [0.0] * len(variables)
    squares: dict[int, Tensor | None] = {}
    for members, s in stats:
        for k, i in enumerate(members):
            as_elements = mixed and s.weights[k] > 0
            weight = float(size_of(variables[i])) if as_elements else s.weights[k]
            weights[i] = max(weights[i], weight)
            squares.setdefault(i, s.square_norms[k] if s.square_norms else None)

    def fractions() -> list[Tensor | None]:
        result: list[Tensor | None] = [None] * len(variables)
        for members, s in stats:
            for i, fraction in zip(members, s.fractions(), strict=True):
                if fraction is not None:
                    other = result[i]
                    result[i] = fraction if other is None else ops.maximum(other, fraction)
        return result

    unit = "elements" if mixed or not stats else stats[0][1].unit
    return ClipStats(fractions, weights, unit, [squares.get(i) for i in range(len(weights))])
