"""Enforcement of limits: the only module of the library that clips.

For each clipper it takes norms over the scope, gets the limit, clips, rescales, and counts what was
clipped. Gradients may be dense, sparse or None, of any float dtype, and may contain infinities.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import keras
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _validation as validation
from keras_gradclip._types import Gradient, Hyper, Limits, State, Tensor, Threshold
from keras_gradclip.clippers.units import (
    BIAS,
    KERNEL,
    OTHER,
    Unit,
    kernels_of_biases,
    norms_for_bias,
    number_of_units,
    units_of,
    with_axes,
)
from keras_gradclip.names import SCOPES, scope_numbers, size_of

#: Keys of `hyper` beside hyper-parameters: the optimizer's learning rate, and whether it is a
#: variable instead of a schedule.
LEARNING_RATE, RATE_IS_SET = "learning_rate", "rate is set"
#: The words of `Limit`'s attributes.
WORDS: dict[str, tuple] = {
    "scope": ("element", "unit", *SCOPES),
    "stage": ("gradient", "update"),
    "biases": ("own", "unit", None),
    "rescale": (None, "norm", "max", "alpha"),
}


class ClipStats(NamedTuple):
    """Statistics of a clip, one entry per variable, in the order of the variables.

    Attributes:
        fractions: a function that returns a list of float32 scalars in 0..1, the share of the
            variable's elements (or norms) that were clipped; None where no rule applies. A
            function, because it costs operations that most updates do not need.
        weights: a list of floats, the weight of each variable in the overall fraction: its number
            of elements, or its share of a norm.
        unit: the counted unit, "elements" or "norms".
    """

    fractions: Callable[[], list[Tensor | None]]
    weights: list[float]
    unit: str


@dataclasses.dataclass
class Weight:
    """The weights of one scope: of a unit, a variable, a layer, or the model.

    Attributes:
        size: the number of elements.
        read: returns the weight; for a sparse gradient, only the rows in the gradient.
        measured: for each variable in the scope a function that returns what a norm is taken over.
        axes: for units, the axes that one unit spans; None: all.
    """

    size: int
    read: Callable[[], Tensor]
    measured: Sequence[Callable[[], Tensor]]
    axes: Sequence[int] | None = None

    @property
    def values(self) -> Tensor:
        """The weight; for a sparse gradient, only the rows in the gradient."""
        return self.read()

    @functools.cached_property
    def norm(self) -> Tensor:
        """The L2 norm, a float32 scalar; for units one norm each, broadcastable to `values`."""
        values = [read() for read in self.measured]
        if self.axes is None:
            total = arithmetic.sum_of_squares(*values)
        else:
            total = arithmetic.unit_squares(values[0], self.axes)
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
            A float32 scalar, or a tensor of the shape of `weight.values` (or of `weight.norm`).
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
        """The state after a schedule has set the learning rate to `rate`; called as `advance`."""
        del rate, is_new
        return state

    def limits(self, norms: Tensor, usable: Tensor, state: State, hyper: Hyper) -> Limits:
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
        programs = arithmetic.Programs(variables)
        for assignment in assignments:
            late = assignment.clipper.stage == "update" and not update_is_scaled_gradient
            rule = _Rule(assignment, self.variables, programs)
            (self.on_updates if late else self.on_gradients).append(rule)
            self.state |= {rule.name + name: value for name, value in rule.state.items()}

    def limited_updates(self) -> set[int]:
        """Positions of the variables whose weight update may be limited."""
        return {i for rule in self.on_updates for i in rule.limited()}

    def scheduled(self, state: State, rate: Tensor, is_new: bool) -> State:
        """The state after a schedule has set the learning rate to `rate`."""
        new = dict(state)
        for rule in [*self.on_gradients, *self.on_updates]:
            own = {name: state[rule.name + name] for name in rule.state}
            if own and not rule.calls_apply:
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
            weights: None; or, if `grads` are weight updates, the weights before them. Then the new
                weights are returned, not the clipped updates.
        """
        clipped, new_state, stats = list(grads), {}, []
        rules = self.on_gradients if weights is None else self.on_updates
        for rule in rules:
            adds = weights is not None and rule is rules[-1]
            clipped, own_state, own_stats = rule.clip(clipped, weights, state, hyper, adds)
            new_state.update({rule.name + name: value for name, value in own_state.items()})
            stats.append(own_stats)
        if weights is not None:
            added = set() if rules[-1].calls_apply else rules[-1].limited()
            left = {i for i, c in enumerate(clipped) if c is not None} - added
            clipped = [weights[i] + c if i in left else c for i, c in enumerate(clipped)]
        together = stats[0] if len(stats) == 1 else combined(stats, self.variables)
        return clipped, new_state, together


class _Rule:
    """One clipper with its variables, prepared before the first update.

    Attributes:
        wholes: positions of the variables that have one limit together, scope by scope.
        parts: positions of the variables that have one limit for each unit (with the axes that a
            unit spans) or each element (with None); biases after their kernels.
        by_kernel: of the biases among these, positions of the kernels whose units limit them.
    """

    def __init__(
        self,
        assignment: Assignment,
        variables: Sequence[keras.Variable],
        programs: arithmetic.Programs,
    ) -> None:
        self.name, self.clipper, self.members, self.calls_apply = assignment
        self.variables, self.programs = variables, programs
        self.names = [*self.clipper.hyperparameters()]
        self.sizes = [size_of(v) for v in variables]
        self.units: list[Unit] = []
        self.wholes: list[list[int]] = []
        self.parts: dict[int, tuple[int, ...] | None] = {}
        self.by_kernel: dict[int, list[int]] = {}
        own = [variables[i] for i in self.members]
        if self.calls_apply:
            self.state = self.clipper.init(own)
            return
        for word, words in WORDS.items():
            kind = type(self.clipper).__name__
            validation.choice(kind, word, getattr(self.clipper, word), words)
        scope, biases, limited = self.clipper.scope, self.clipper.biases, list(self.members)
        if scope == "unit" or biases != "own":
            self.units = with_axes(units_of(variables), variables, self.clipper.axes)
        if biases != "own":
            limited = [i for i in self.members if self.units[i].is_kernel]
        if scope in SCOPES:
            numbers = dict(zip(self.members, scope_numbers(scope, own), strict=True))
            self.wholes = [[] for _ in {*numbers.values()}]
            for i in limited:
                self.wholes[numbers[i]].append(i)
        self.state = self.clipper.memory(len(self.wholes))
        if scope == "unit":
            is_one = {i: len(self.units[i].axes) == len(variables[i].shape) for i in limited}
            self.wholes = [[i] for i in limited if is_one[i]]
            self.parts = {i: self.units[i].axes for i in limited if not is_one[i]}
        elif scope not in SCOPES:
            self.parts = dict.fromkeys(limited)
        if biases == "unit":
            kernels = kernels_of_biases(variables, self.units)
            self.by_kernel = {i: kernels[i] for i in self.members if i in kernels}
            self.parts |= dict.fromkeys(self.by_kernel)
        parts = self.parts.items()
        self.counts = {i: number_of_units(variables[i], axes or ()) for i, axes in parts}

    def limited(self) -> set[int]:
        """Positions of the variables that may be clipped."""
        return {*self.members} if self.calls_apply else {*itertools.chain(*self.wholes, self.parts)}

    def remarks(self) -> dict[int, str]:
        """Remarks on unexpected clips of variables, by position."""
        result: dict[int, str] = {}
        for i in self.members if self.units else ():
            unit, shape = self.units[i], self.variables[i].shape
            is_free = self.clipper.biases == "unit" and i not in self.by_kernel
            if is_free and unit.kind == BIAS:
                result[i] = "free: a bias without its kernel among the trained variables"
            elif is_free and unit.kind == OTHER and not unit.is_known:
                result[i] = "free: a vector without a kernel of as many units in its layer"
            elif not unit.is_known and unit.kind == KERNEL and sum(int(d) != 1 for d in shape) > 2:
                result[i] = f"units over the axes {unit.axes}: a guess, pass `axes`"
        return result

    def clip(
        self,
        grads: list[Gradient],
        weights: Sequence[Tensor | None] | None,
        state: State,
        hyper: Hyper,
        adds: bool,
    ) -> tuple[list[Gradient], State, ClipStats]:
        """See `Enforcer.clip`; `adds`: the weights are added, while they are at hand."""
        own_state = {name: state[self.name + name] for name in self.state}
        own_hyper: Hyper = {name: hyper[self.name + name] for name in self.names}
        rate = hyper.get(LEARNING_RATE, 1.0)
        if self.calls_apply:
            rate = rate if weights is None else ops.ones((), "float32")
            return self._apply(grads, own_state, {**own_hyper, LEARNING_RATE: rate})
        own_hyper = {**own_hyper, LEARNING_RATE: rate, RATE_IS_SET: hyper.get(RATE_IS_SET)}
        if own_state:
            own_state, own_hyper = self.clipper.advance(own_state, own_hyper)
        of_sgd = self.clipper.stage == "update" and weights is None
        clip = _Enforcement(
            self, self.clipper, grads, list(grads), weights, own_hyper, adds, of_sgd
        )
        if self.wholes:
            own_state = clip.wholes(own_state)
        if self.parts:
            clip.parts()
        unit = "elements" if self.clipper.scope == "element" else "norms"
        counts = [clip.counts.get(i, 0.0) for i in range(len(grads))]
        return clip.clipped, own_state, ClipStats(clip.fractions, counts, unit)

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

        weights = spread(stats.weights, 0.0)
        return result, state, ClipStats(lambda: spread(stats.fractions()), weights, stats.unit)


@dataclasses.dataclass
class _Enforcement:
    """One rule in one update.

    Attributes:
        rule: the clipper with its variables.
        clipper: the clipper alone.
        before: the gradients, or weight updates, one entry a variable.
        clipped: the same after the clip.
        weights: the weights before weight updates; None: the present ones.
        hyper: the values of the clipper's hyper-parameters, and the learning rate.
        adds: the weights are added to what is clipped.
        of_sgd: the limit is one of SGD's update η·g, and enforced on g.
        counts: the number of elements, or norms, by position.
        factors: of each whole scope its variables, and what they were multiplied by.
    """

    rule: _Rule
    clipper: Limit
    before: Sequence[Gradient]
    clipped: list[Gradient]
    weights: Sequence[Tensor | None] | None
    hyper: Hyper
    adds: bool
    of_sgd: bool
    counts: dict[int, float] = dataclasses.field(default_factory=dict)
    factors: list[tuple[list[int], Tensor]] = dataclasses.field(default_factory=list)
    _known: dict[object, Weight] = dataclasses.field(default_factory=dict)

    def wholes(self, state: State) -> State:
        """Clips by g' = g·min(1, L/‖g‖), ‖·‖ over each whole scope; returns the new state.

        All scopes at once: a memory takes all norms, and small scopes share operations.
        """
        every = [[i for i in of if self.before[i] is not None] for of in self.rule.wholes]
        scopes = {number: of for number, of in enumerate(every) if of}
        if not scopes:
            return state
        squares = {
            number: arithmetic.sum_of_squares(*(arithmetic.values(self.before[i]) for i in of))
            for number, of in scopes.items()
        }
        if type(self.clipper).limits is Limit.limits:
            limits = [self._limit(self._weight(of), self.hyper) for of in scopes.values()]
        else:
            limits, state = self._limits_from_memory(squares, state)
        sizes = [sum(self.rule.sizes[i] for i in of) for of in scopes.values()]
        factors = arithmetic.clip_factors([*squares.values()], limits, sizes)
        self.factors = list(zip(scopes.values(), factors, strict=True))
        for of, factor in self.factors:
            for i in of:
                x = arithmetic.values(self.before[i])
                y = arithmetic.scale(x, factor)
                if self.clipper.rescale:
                    y = arithmetic.rescaled(self.clipper.rescale, x, y)
                y = self._read(i) + y if self.adds else y
                self.clipped[i] = arithmetic.with_values(self.before[i], y)
                self.counts[i] = 1.0 / len(of)
        return state

    def _limits_from_memory(
        self, squares: Mapping[int, Tensor], state: State
    ) -> tuple[list[Tensor], State]:
        """The limits of a clipper with memory, which takes the norms of all scopes."""
        zero, number = ops.zeros((), "float32"), len(self.rule.wholes)
        norms = ops.sqrt(ops.stack([squares.get(n, zero) for n in range(number)]))
        rate = ops.maximum(self.hyper[LEARNING_RATE], arithmetic.TINY) if self.of_sgd else None
        norms = norms if rate is None else norms * rate
        usable = ops.logical_and(ops.isfinite(norms), norms > 0)
        # Keep unusable norms out of the memory's arithmetic: 0·inf is NaN.
        safe = ops.where(usable, norms, ops.zeros_like(norms))
        limits, state = self.clipper.limits(safe, usable, state, self.hyper)
        every = ops.unstack(limits if rate is None else limits / rate, num=number)
        return [every[n] for n in squares], state

    def parts(self) -> None:
        """Clips each unit of a variable in the same way; or by g' = clip(g, −L, L) each element."""
        for i, axes in self.rule.parts.items():
            if self.before[i] is None:
                continue
            x, weight = arithmetic.values(self.before[i]), self._weight([i], axes)
            pays = i not in self.rule.by_kernel and self.rule.programs.pays(x)
            if pays and (axes or len(self._limit(weight, self.hyper).shape) > 0):
                y = self._compiled(x, weight)
            else:
                y = self._clip(x, weight, self.hyper)
            self.clipped[i] = arithmetic.with_values(self.before[i], y)
            self.counts[i] = self.rule.counts[i]

    def _clip(self, x: Tensor, weight: Weight, hyper: Hyper) -> Tensor:
        """A gradient with each unit of the weight, or each element, within its limit."""
        limit, axes = self._limit(weight, hyper), weight.axes
        if axes is None:
            limit = ops.cast(limit, x.dtype)
            y = arithmetic.clip_between(x, -limit, limit)
        else:
            norm = ops.sqrt(arithmetic.unit_squares(x, axes))
            y = arithmetic.scale(x, arithmetic.clip_factor(norm, limit))
        if self.clipper.rescale == "alpha":
            y = arithmetic.scale(y, self.clipper.growth(weight, hyper))
        elif self.clipper.rescale:
            y = arithmetic.rescaled(self.clipper.rescale, x, y)
        return weight.values + y if self.adds else y

    def _compiled(self, x: Tensor, weight: Weight) -> Tensor:
        """`_clip` as an XLA program, which also computes the weight's norms of units."""
        size, axes = weight.size, weight.axes

        def clip(x: Tensor, values: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor | None]:
            weight = Weight(size, lambda: values, [lambda: values], axes)
            return self._clip(x, weight, hyper), None if axes is None else weight.norm

        arguments = (x, weight.values, self.hyper)
        y, norm = self.rule.programs.run((self.rule.name, axes, self.adds), clip, *arguments)
        if axes is not None:
            weight.norm = norm
        return y

    def fractions(self) -> list[Tensor | None]:
        """The clipped share of each variable's elements, or norms; None without a limit."""
        result: list[Tensor | None] = [None] * len(self.before)
        if self.factors:
            clipped = arithmetic.float32(ops.stack([factor for _, factor in self.factors]) < 1.0)
            hits = ops.unstack(clipped, num=len(self.factors))
            for (of, _), hit in zip(self.factors, hits, strict=True):
                for i in of:
                    result[i] = hit
        members = [i for i in self.rule.parts if self.before[i] is not None]
        if not members:
            return result
        xs, limits = [], []
        for i in members:
            x, axes = arithmetic.values(self.before[i]), self.rule.parts[i]
            xs.append(x if axes is None else ops.sqrt(arithmetic.unit_squares(x, axes)))
            limits.append(self._limit(self._weight([i], axes), self.hyper))
        shares = arithmetic.fractions_over(xs, limits, [self.counts[i] for i in members])
        for i, share in zip(members, shares, strict=True):
            result[i] = share
        return result

    def _limit(self, weight: Weight, hyper: Hyper) -> Tensor:
        """The clipper's limit; divided by the learning rate if it limits SGD's update."""
        limit = ops.convert_to_tensor(self.clipper.limit(weight, hyper))
        return limit / ops.maximum(hyper[LEARNING_RATE], arithmetic.TINY) if self.of_sgd else limit

    def _weight(self, members: Sequence[int], axes: tuple[int, ...] | None = None) -> Weight:
        """The `Weight` of some variables together, or of the units or elements of one."""
        i, key = members[0], (*members, axes)
        if key in self._known:
            return self._known[key]
        size = sum(self.rule.sizes[k] for k in members)
        measured = [functools.partial(self._read, k) for k in members]
        rows: Callable[[], Tensor] = measured[0]
        if arithmetic.is_sparse(self.before[i]):
            rows = lambda: arithmetic.matching_rows(self._read(i), self.before[i])  # noqa: E731
        has_rows = axes is not None and 0 not in axes
        weight = Weight(size, rows, [rows] if has_rows else measured, axes)
        if i in self.rule.by_kernel:
            units = self.rule.units
            norms = [self._weight([k], units[k].axes).norm for k in self.rule.by_kernel[i]]
            norm = norms_for_bias(units[i], self.rule.variables[i].shape, norms)
            weight.norm = arithmetic.matching_rows(norm, self.before[i])
        self._known[key] = weight
        return weight

    def _read(self, i: int) -> Tensor:
        """The value of a variable's weight."""
        given = None if self.weights is None else self.weights[i]
        return arithmetic.read(self.rule.variables[i]) if given is None else given


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

    def fractions() -> list[Tensor | None]:
        of_rules = [s.fractions() for s in stats]
        of_variables = [[f[i] for f in of_rules if f[i] is not None] for i in every]
        return [functools.reduce(ops.maximum, f) if f else None for f in of_variables]

    unit = "elements" if mixed or not units else units[0]
    return ClipStats(fractions, weights, unit)
