"""Enforcement of limits: the only module of the library that clips.

For each clipper it takes norms over the scope, gets the limit, clips, rescales, and counts what was
clipped. Gradients may be dense, sparse or None, of any float dtype, and may contain infinities.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import keras
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip._types import Gradient, Hyper, State, Tensor, Threshold
from keras_gradclip.clippers.units import (
    BIAS,
    KERNEL,
    Unit,
    kernels_of_biases,
    norms_for_bias,
    units_of,
    with_axes,
)
from keras_gradclip.names import SCOPES, scope_numbers, size_of

#: Keys of `hyper`: the optimizer's learning rate; whether it is a variable instead of a schedule;
#: and the divisor of limits, which is the learning rate for limits on SGD's update. Clippers get
#: only the first: the others are names that no parameter can have.
LEARNING_RATE, RATE_IS_SET, DIVISOR = "learning_rate", "rate is set", "divide by"


class ClipStats(NamedTuple):
    """Statistics of a clip, one entry per variable, in the order of the variables.

    Attributes:
        fractions: a function that returns a list of float32 scalars in 0..1, the share of the
            variable's elements (or norms) that were clipped; None where no rule applies. A
            function, because it costs operations that most updates do not need.
        weights: a list of floats, the weight of each variable in the overall fraction: its number
            of elements, or its share of a norm.
        unit: the counted unit, "elements" or "norms".
        square_norms: a list of float32 scalars, the squared L2 norms before the clip if they
            were computed anyway; else None.
    """

    fractions: Callable[[], list[Tensor | None]]
    weights: list[float]
    unit: str
    square_norms: list[Tensor | None] | None = None


@dataclasses.dataclass
class Weight:
    """The weights of one scope: of a unit, a variable, a layer, or the model.

    Attributes:
        read: for each variable in the scope a function that returns its weight.
        size: the number of elements.
        axes: for units, the axes that one unit spans; None: all.
        rows: for a sparse gradient, a function that returns the weight's rows in the gradient.
        known_norm: the norms, if already computed.
    """

    read: Sequence[Callable[[], Tensor]] = ()
    size: int = 0
    axes: Sequence[int] | None = None
    rows: Callable[[], Tensor] | None = None
    known_norm: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """The weight; for a sparse gradient, only the rows in the gradient."""
        return (self.rows or self.read[0])()

    @functools.cached_property
    def norm(self) -> Tensor:
        """The L2 norm, a float32 scalar; for units one norm each, broadcastable to `values`."""
        if self.known_norm is not None:
            return self.known_norm
        squares = [arithmetic.unit_squares(read(), self.axes) for read in self.read]
        total = squares[0] if len(squares) == 1 else ops.sum(ops.stack(squares))
        return ops.minimum(ops.sqrt(total), arithmetic.LARGEST)

    @property
    def rms(self) -> Tensor:
        """The root mean square, a float32 scalar."""
        return self.norm / math.sqrt(max(self.size, 1))


class Assignment(NamedTuple):
    """One clipper and the variables that it limits.

    Attributes:
        name: prefix of its hyper-parameters and state, ending in "/"; "" for a clipper by itself.
        clipper: the clipper; not a `ClipMap` or a `Chain`.
        members: positions of the variables.
        calls_apply: the clipper overrides `apply`, which is called instead of enforcing a limit.
    """

    name: str
    clipper: Limit
    members: tuple[int, ...]
    calls_apply: bool = False


class Limit:
    """A limit on the size of gradients or weight updates; base class of `Clipper`.

    The class attributes may also be dataclass fields.
    """

    #: The scope of one limit: "element", "unit" (the weights of one output), "variable", "layer" or
    #: "global".
    scope: str = "element"
    #: "gradient", or "update": the limit applies to the weight update of the inner optimizer. For
    #: SGD, whose update is η·g, it is enforced as limit/η on the gradient.
    stage: str = "gradient"
    #: The limit of biases and scales: "own", like any other variable; "unit", each element by the
    #: norm of its unit in the layer's kernel; None, no limit.
    biases: str | None = "own"
    #: The rescaling after the clip: None, "norm", "max" or "alpha".
    rescale: str | None = None
    #: The axes of units, by path of the variable; () for those of the layers.
    axes: Sequence[tuple[str, tuple[int, ...]]] | None = None
    #: Whether it needs `hyper["learning_rate"]`.
    needs_learning_rate: bool = False

    def hyperparameters(self) -> Mapping[str, Threshold]:
        """The live hyper-parameters: name to float or LearningRateSchedule."""
        return {}

    #: Of a clipper that is no limit: see `Clipper`, which has both.
    init: Callable[..., dict[str, object]]
    apply: Callable[..., tuple[list[Gradient], State, ClipStats]]

    def limit(self, weight: Weight, hyper: Hyper) -> Tensor:
        """The largest allowed element (or L2 norm).

        Args:
            weight: the weights of the scope.
            hyper: the values of `hyperparameters()` at this update, as float32 scalars, and
                "learning_rate".

        Returns:
            A float32 scalar, or a tensor that broadcasts to the gradient (or to `weight.norm`).
        """
        raise NotImplementedError(f"{type(self).__name__} has neither `limit` nor `limits`")

    def growth(self, weight: Weight, hyper: Hyper) -> Tensor:
        """The factor of `rescale="alpha"`."""
        raise NotImplementedError(f"{type(self).__name__} has no rescale='alpha'")

    def memory(self, scopes: int) -> dict[str, object]:
        """The initial state for a number of scopes: name to NumPy array."""
        del scopes
        return {}

    def advance(self, state: State, hyper: Hyper) -> tuple[State, Hyper]:
        """The new state, and the values for `limit`; called once per update if there is a state."""
        return state, hyper

    def scheduled(self, state: State, rate: Tensor, is_new: bool) -> State:
        """The state after a schedule has set the learning rate to `rate`."""
        del rate, is_new
        return state

    def limits(
        self, norms: Tensor, usable: Tensor, state: State, hyper: Hyper
    ) -> tuple[Tensor, State]:
        """The limit of each scope, and the new state.

        Args:
            norms: float32 `[scopes]`, before the clip; 0 where `usable` is false.
            usable: boolean `[scopes]`: the norm is finite and above 0, so that it may be stored. A
                missing or zero gradient is no evidence.
            state: the state from `memory` or the last `limits`.
            hyper: as in `limit`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no memory")


class Enforcer:
    """Enforces limits on gradients, or on the weight updates of an inner optimizer.

    Args:
        assignments: the clippers and their variables, in the order of clipping.
        variables: the variables, in the order of the gradients.
        update_is_scaled_gradient: whether the inner optimizer's update is η·g (SGD), so that a
            limit on the update can be enforced on the gradient.

    Attributes:
        on_gradients: the rules for gradients, in order.
        on_updates: the rules for weight updates.
        state: the state before the first update, name to NumPy array.
    """

    def __init__(
        self,
        assignments: Sequence[Assignment],
        variables: Sequence[keras.Variable],
        update_is_scaled_gradient: bool = True,
    ) -> None:
        self.variables = list(variables)
        self.on_gradients: list[_Rule] = []
        self.on_updates: list[_Rule] = []
        self.state: dict[str, object] = {}
        programs, seen = arithmetic.Programs(variables), set[int]()
        for assignment in assignments:
            late = assignment.clipper.stage == "update" and not update_is_scaled_gradient
            first = set() if late else {*assignment.members} - seen
            rule = _Rule(assignment, self.variables, programs, first)
            (self.on_updates if late else self.on_gradients).append(rule)
            self.state |= {rule.name + name: value for name, value in rule.state.items()}
            seen |= first

    def limited_updates(self) -> set[int]:
        """Positions of the variables whose weight update may be limited."""
        return {i for r in self.on_updates for i in (r.members if r.calls_apply else r.limited)}

    def scheduled(self, state: State, rate: Tensor, is_new: bool) -> State:
        """The state after a schedule has set the learning rate to `rate`."""
        new = dict(state)
        for rule in [*self.on_gradients, *self.on_updates]:
            if not rule.calls_apply:
                own = {name: state[rule.name + name] for name in rule.state}
                for name, value in rule.clipper.scheduled(own, rate, is_new).items():
                    new[rule.name + name] = value
        return new

    def remarks(self) -> list[str]:
        """A remark on each variable if its clip is unexpected; else ""."""
        every = [rule.remarks() for rule in [*self.on_gradients, *self.on_updates]]
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
        """The clipped gradients, the changed state, and a `ClipStats`.

        Args:
            grads: one per variable, without duplicate rows; may be None.
            state: the state of all clippers.
            hyper: the values of all clippers, and "learning_rate" (1 if missing).
            weights: None; or, if `grads` are weight updates, the weights before them.
        """
        clipped, new_state, stats = list(grads), {}, []
        for rule in self.on_gradients if weights is None else self.on_updates:
            clipped, own_state, own_stats = rule.clip(clipped, weights, state, hyper)
            new_state.update({rule.name + name: value for name, value in own_state.items()})
            stats.append(own_stats)
        together = stats[0] if len(stats) == 1 else combined(stats, self.variables)
        return clipped, new_state, together


class _Rule:
    """One clipper with its variables, prepared before the first update.

    Args:
        assignment: the clipper and its variables.
        variables: all variables.
        programs: compiled functions of one gradient.
        first: positions of the variables that no earlier rule clips.
    """

    def __init__(
        self,
        assignment: Assignment,
        variables: Sequence[keras.Variable],
        programs: arithmetic.Programs,
        first: set[int],
    ) -> None:
        self.name, self.clipper, self.members, self.calls_apply = assignment
        self.variables, self.programs, self.first = variables, programs, first
        self.names = [*self.clipper.hyperparameters()]
        self.sizes = [size_of(v) for v in variables]
        self.units: list[Unit] = []
        own = [variables[i] for i in self.members]
        if self.calls_apply:
            self.state = self.clipper.init(own)
            return
        if self.clipper.scope == "unit" or self.clipper.biases != "own":
            self.units = with_axes(units_of(variables), variables, self.clipper.axes)
        #: Positions of the variables that are limited over the clipper's scope ...
        self.in_scope = list(self.members)
        if self.clipper.biases != "own":
            self.in_scope = [i for i in self.members if self.units[i].is_kernel]
        #: ... and of biases, with those of the kernels whose units limit them by the element.
        self.by_kernel: dict[int, list[int]] = {}
        if self.clipper.biases == "unit":
            kernels = kernels_of_biases(variables, self.units)
            self.by_kernel = {i: kernels[i] for i in self.members if i in kernels}
        self.limited = [*self.in_scope, *self.by_kernel]
        self.scopes: dict[int, int] = {}
        if self.clipper.scope in SCOPES:
            numbers = scope_numbers(self.clipper.scope, own)
            self.scopes = dict(zip(self.members, numbers, strict=True))
        self.state = self.clipper.memory(max(self.scopes.values(), default=-1) + 1)

    def remarks(self) -> dict[int, str]:
        """Remarks on unexpected clips of variables, by position."""
        result: dict[int, str] = {}
        for i in self.members if self.units else ():
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
    ) -> tuple[list[Gradient], State, ClipStats]:
        """The clipped gradients, the clipper's new state, and a `ClipStats`."""
        rate = hyper.get(LEARNING_RATE, 1.0)
        own_state = {name: state[self.name + name] for name in self.state}
        own_hyper: Hyper = {name: hyper[self.name + name] for name in self.names}
        if self.calls_apply:
            rate = rate if weights is None else ops.ones((), "float32")
            return self._apply(grads, own_state, {**own_hyper, LEARNING_RATE: rate})
        own_hyper = {**own_hyper, LEARNING_RATE: rate}
        if own_state:
            is_set = {RATE_IS_SET: hyper.get(RATE_IS_SET)}
            own_state, own_hyper = self.clipper.advance(own_state, {**own_hyper, **is_set})
        if self.clipper.stage == "update" and weights is None:
            own_hyper = {**own_hyper, DIVISOR: rate}
        clip = _Clip(self, self.clipper, grads, list(grads), weights, own_hyper)
        if self.clipper.scope in SCOPES:
            own_state = clip.norms(own_state)
        elif self.clipper.scope == "unit":
            clip.units()
        else:
            clip.elements()
        if self.by_kernel:
            clip.biases()
        return clip.clipped, own_state, clip.stats()

    def _apply(
        self, grads: Sequence[Gradient], state: State, hyper: Hyper
    ) -> tuple[list[Gradient], State, ClipStats]:
        """`clip` with the clipper's own `apply`."""
        clipped, state, stats = self.clipper.apply(
            [grads[i] for i in self.members],
            [self.variables[i] for i in self.members],
            state,
            hyper,
        )
        result = list(grads)
        for i, gradient in zip(self.members, clipped, strict=True):
            result[i] = gradient

        def spread(values: Sequence, least: object = None) -> list:
            by_position = dict(zip(self.members, values, strict=True))
            return [by_position.get(i, least) for i in range(len(grads))]

        squares = spread(stats.square_norms or [None] * len(self.members))
        squares = [x if i in self.first else None for i, x in enumerate(squares)]
        weights = spread(stats.weights, 0.0)
        return (
            result,
            state,
            ClipStats(lambda: spread(stats.fractions()), weights, stats.unit, squares),
        )


@dataclasses.dataclass
class _Clip:
    """One clipper in one update.

    Attributes:
        rule: the clipper's.
        clipper: the clipper.
        before: the gradients, or weight updates, one entry a variable.
        clipped: the same after the clip.
        weights: the weights before weight updates; None: the present ones.
        hyper: the values of the clipper's hyper-parameters, and `DIVISOR`.
        counts: the number of elements, or norms, by position.
        squares: squared norms before the clip, by position.
        weight_norms: norms of the kernels' units, by position.
        fractions: functions that return the clipped fraction, by position.
    """

    rule: _Rule
    clipper: Limit
    before: Sequence[Gradient]
    clipped: list[Gradient]
    weights: Sequence[Tensor | None] | None
    hyper: Hyper
    counts: dict[int, float] = dataclasses.field(default_factory=dict)
    squares: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    weight_norms: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    fractions: list[Callable[[], Mapping[int, Tensor]]] = dataclasses.field(default_factory=list)

    def elements(self) -> None:
        """G' = clip(g, −L, L) for each element, then the rescale."""
        members = [i for i in self.rule.in_scope if self.before[i] is not None]
        for i in members:
            x, weight = arithmetic.values(self.before[i]), self._weight_of(i)
            limit = _limit(self.clipper, weight, self.hyper)
            if len(limit.shape) > 0 and self.rule.programs.pays(x):  # a limit for each element
                y, _ = self._compiled(i, x)
            else:
                y = _clip_elements(self.clipper, x, weight, limit, self.hyper)
            self.clipped[i] = arithmetic.with_values(self.before[i], y)
        self._count_elements(
            members, lambda i: _limit(self.clipper, self._weight_of(i), self.hyper)
        )

    def biases(self) -> None:
        """|g'| at most L for each element of a bias, by its unit's norm in the layer's kernel."""
        members = [i for i in self.rule.by_kernel if self.before[i] is not None]
        norms = {i: self._norm_for_bias(i) for i in members}
        alike: dict[object, list[int]] = {}  # variables of one dtype share operations
        for i in members:
            x = self.before[i]
            is_alone = arithmetic.is_sparse(x) or None in tuple(x.shape) or self.clipper.rescale
            alike.setdefault(i if is_alone else x.dtype, []).append(i)
        for group in alike.values():
            xs = [arithmetic.values(self.before[i]) for i in group]
            limit = _limit(
                self.clipper,
                Weight(known_norm=arithmetic.joined([norms[i] for i in group])),
                self.hyper,
            )
            y = _clip_elements(self.clipper, arithmetic.joined(xs), Weight(), limit, self.hyper)
            for i, piece in zip(group, arithmetic.parted(y, xs), strict=True):
                self.clipped[i] = arithmetic.with_values(self.before[i], piece)
        self._count_elements(
            members, lambda i: _limit(self.clipper, Weight(known_norm=norms[i]), self.hyper)
        )

    def _count_elements(self, members: Sequence[int], limit_of: Callable[[int], Tensor]) -> None:
        """Records the count of elements, and a function for the clipped fraction."""
        sizes = {i: self.rule.sizes[i] for i in members}
        self.counts.update({i: float(size) for i, size in sizes.items()})

        def fractions() -> dict[int, Tensor]:
            xs = [arithmetic.values(self.before[i]) for i in members]
            limits = [limit_of(i) for i in members]
            shares = arithmetic.fractions_over(xs, limits, [*sizes.values()])
            return dict(zip(members, shares, strict=True))

        self.fractions.append(fractions)

    def units(self) -> None:
        """g'_u = g_u·min(1, L_u/‖g_u‖) for each unit u."""
        members = [i for i in self.rule.in_scope if self.before[i] is not None]
        single: dict[int, Tensor] = {}  # small variables of one unit share operations
        for i in members:
            x, axes = arithmetic.values(self.before[i]), self.rule.units[i].axes
            shape = self.rule.variables[i].shape
            self.counts[i] = float(math.prod(d for k, d in enumerate(shape) if k not in axes))
            if len(axes) == len(shape) and self.rule.sizes[i] < arithmetic.SMALL:
                single[i] = arithmetic.sum_of_squares(x)
                continue
            if self.rule.programs.pays(x):
                y, self.weight_norms[i] = self._compiled(i, x)
            else:
                weight = self._weight_of(i)
                y = _clip_units(axes, x, _limit(self.clipper, weight, self.hyper))
                self.weight_norms[i] = weight.norm
            self.clipped[i] = arithmetic.with_values(self.before[i], y)
        if single:
            self.squares.update(single)
            norms = ops.sqrt(ops.stack([*single.values()]))
            weights = ops.stack([self._weight_of(i).norm for i in single])
            factors = arithmetic.clip_factor(
                norms, _limit(self.clipper, Weight(known_norm=weights), self.hyper)
            )
            for i, factor in zip(single, ops.unstack(factors, num=len(single)), strict=True):
                y = arithmetic.scale(arithmetic.values(self.before[i]), factor)
                self.clipped[i] = arithmetic.with_values(self.before[i], y)

        def fractions() -> dict[int, Tensor]:
            result = {}
            for i in members:
                x, axes = arithmetic.values(self.before[i]), self.rule.units[i].axes
                norm = ops.sqrt(arithmetic.unit_squares(x, axes))
                over = ops.sum(
                    arithmetic.float32(norm > _limit(self.clipper, self._weight_of(i), self.hyper))
                )
                result[i] = over / max(self.counts[i], 1.0)
            return result

        self.fractions.append(fractions)

    def norms(self, state: State) -> State:
        """G' = g·min(1, L/‖g‖), ‖·‖ over a variable, a layer or everything; the new state."""
        members: dict[int, list[int]] = {}  # of each scope
        for i in self.rule.in_scope:
            if self.before[i] is not None:
                members.setdefault(self.rule.scopes[i], []).append(i)
                self.squares[i] = arithmetic.sum_of_squares(arithmetic.values(self.before[i]))
        if not members:
            return state
        of_scopes = [[self.squares[i] for i in of] for of in members.values()]
        squares = [s[0] if len(s) == 1 else ops.sum(ops.stack(s)) for s in of_scopes]
        if type(self.clipper).limits is Limit.limits:
            sizes = [sum(self.rule.sizes[i] for i in of) for of in members.values()]
            limits = [
                _limit(
                    self.clipper,
                    Weight([functools.partial(self._read, i) for i in of], size),
                    self.hyper,
                )
                for of, size in zip(members.values(), sizes, strict=True)
            ]
            factors = arithmetic.clip_factors(squares, limits, sizes)
        else:
            by_scope = dict(zip(members, squares, strict=True))
            factors, state = self._factors_from_memory(by_scope, state)
        for factor, of_scope in zip(factors, members.values(), strict=True):
            for i in of_scope:
                x = arithmetic.values(self.before[i])
                y = arithmetic.scale(x, factor)
                if self.clipper.rescale:
                    y = arithmetic.rescaled(self.clipper.rescale, x, y)
                self.clipped[i] = arithmetic.with_values(self.before[i], y)
                self.counts[i] = 1.0 / len(of_scope)

        def fractions() -> dict[int, Tensor]:
            hits = ops.unstack(arithmetic.float32(ops.stack(factors) < 1.0), num=len(factors))
            return {i: hit for hit, of in zip(hits, members.values(), strict=True) for i in of}

        self.fractions.append(fractions)
        return state

    def _factors_from_memory(
        self, squares: Mapping[int, Tensor], state: State
    ) -> tuple[list[Tensor], State]:
        """Factors of a clipper with memory, for all scopes at once, and the new state."""
        zero = ops.zeros((), "float32")
        number = max(self.rule.scopes.values()) + 1
        norms = ops.sqrt(ops.stack([squares.get(s, zero) for s in range(number)]))
        usable = ops.logical_and(ops.isfinite(norms), norms > 0)
        # Keep unusable norms out of the memory's arithmetic: 0·inf is NaN.
        safe = ops.where(usable, norms, ops.zeros_like(norms))
        limits, state = self.clipper.limits(safe, usable, state, self.hyper)
        every = ops.unstack(arithmetic.clip_factor(norms, limits), num=number)
        return [every[s] for s in squares], state

    def stats(self) -> ClipStats:
        """The statistics of the clip."""
        every = range(len(self.before))

        def fractions() -> list[Tensor | None]:
            known = {i: f for function in self.fractions for i, f in function().items()}
            return [known.get(i) for i in every]

        unit = "elements" if self.clipper.scope == "element" else "norms"
        counts = [self.counts.get(i, 0.0) for i in every]
        squares = [self.squares.get(i) if i in self.rule.first else None for i in every]
        return ClipStats(fractions, counts, unit, squares)

    def _compiled(self, i: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The clip of one gradient as an XLA program; by units, also the weight's norms."""
        clipper, size = self.clipper, self.rule.sizes[i]
        axes = self.rule.units[i].axes if clipper.scope == "unit" else None

        def clip(x: Tensor, values: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor | None]:
            weight = Weight([lambda: values], size, axes)
            limit = _limit(clipper, weight, hyper)
            if axes is None:
                return _clip_elements(clipper, x, weight, limit, hyper), None
            return _clip_units(axes, x, limit), weight.norm

        arguments = (x, self._weight_of(i).values, self.hyper)
        return self.rule.programs.run((self.rule.name, axes), clip, *arguments)

    def _read(self, i: int) -> Tensor:
        """The value of a variable's weight."""
        given = None if self.weights is None else self.weights[i]
        return arithmetic.read(self.rule.variables[i]) if given is None else given

    def _weight_of(self, i: int) -> Weight:
        """The `Weight` of a variable, or of its units."""
        whole, size = functools.partial(self._read, i), self.rule.sizes[i]
        rows: Callable[[], Tensor] = whole
        if arithmetic.is_sparse(self.before[i]):
            rows = lambda: arithmetic.matching_rows(self._read(i), self.before[i])  # noqa: E731
        if self.clipper.scope != "unit":
            return Weight([whole], size, rows=rows)
        axes = self.rule.units[i].axes
        return Weight([whole if 0 in axes else rows], size, axes)

    def _norm_for_bias(self, i: int) -> Tensor:
        """The norm of each bias element's unit in the layer's kernel."""
        norms = []
        for k in self.rule.by_kernel[i]:
            if k not in self.weight_norms:
                axes = self.rule.units[k].axes
                self.weight_norms[k] = ops.sqrt(arithmetic.unit_squares(self._read(k), axes))
            norms.append(self.weight_norms[k])
        norm = norms_for_bias(self.rule.units[i], self.rule.variables[i].shape, norms)
        return arithmetic.matching_rows(norm, self.before[i])


def _limit(clipper: Limit, weight: Weight, hyper: Hyper) -> Tensor:
    """The clipper's limit; divided by the learning rate if it limits SGD's update."""
    limit = ops.convert_to_tensor(clipper.limit(weight, hyper))
    return limit / ops.maximum(hyper[DIVISOR], arithmetic.TINY) if DIVISOR in hyper else limit


def _clip_elements(
    clipper: Limit, x: Tensor, weight: Weight, limit: Tensor, hyper: Hyper
) -> Tensor:
    limit = ops.cast(limit, x.dtype)
    y = arithmetic.clip_between(x, -limit, limit)
    if clipper.rescale is None:
        return y
    if clipper.rescale == "alpha":
        return arithmetic.scale(y, clipper.growth(weight, hyper))
    return arithmetic.rescaled(clipper.rescale, x, y)


def _clip_units(axes: Sequence[int], x: Tensor, limit: Tensor) -> Tensor:
    norm = ops.sqrt(arithmetic.unit_squares(x, axes))
    return arithmetic.scale(x, arithmetic.clip_factor(norm, limit))


def combined(stats: Sequence[ClipStats], variables: Sequence[keras.Variable]) -> ClipStats:
    """The combined statistics of several rules.

    If several rules clip a variable, the largest fraction counts. If some rules count elements and
    others norms, a norm counts as all its elements.
    """
    units = list(dict.fromkeys(s.unit for s in stats if any(s.weights)))
    every, mixed = range(len(variables)), len(units) > 1
    weights = [max((s.weights[i] for s in stats), default=0.0) for i in every]
    if mixed:
        weights = [float(size_of(variables[i])) if weights[i] > 0 else 0.0 for i in every]
    known = [s.square_norms for s in stats if s.square_norms]

    def fractions() -> list[Tensor | None]:
        of_rules = [s.fractions() for s in stats]
        of_variables = [[f[i] for f in of_rules if f[i] is not None] for i in every]
        return [functools.reduce(ops.maximum, f) if f else None for f in of_variables]

    unit = "elements" if mixed or not units else units[0]
    squares = [next((s[i] for s in known if s[i] is not None), None) for i in every]
    return ClipStats(fractions, weights, unit, squares)
