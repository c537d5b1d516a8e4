"""Enforcement of limits: the one place of the library that clips.

For each rule: take norms over its scope, ask the clipper for the limit, clip, rescale, and count
what was clipped. Gradients may be dense, sparse or None, of any float dtype, and hold infinities.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import keras
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip._names import SCOPES, path_of, scope_numbers, size_of
from keras_gradclip._types import Gradient, Hyper, State, Tensor
from keras_gradclip.clippers.limit import Assignment, ClipStats, Limit, Weight
from keras_gradclip.clippers.units import Unit, number_of_units, units_of

LEARNING_RATE = "learning_rate"
#: Stands for "no limit": an infinity would turn into NaN when divided.
NO_LIMIT = 1e38


class Enforcer:
    """Enforces rules on gradients, or on the weight updates of an inner optimizer.

    Args:
        rules: who limits what, in the order in which they clip.
        variables: the variables, in the order of the gradients.
        update_is_scaled_gradient: the inner optimizer's update is η·g (SGD), so that a limit on
            the update is enforced on the gradient. Otherwise `clip_updates` enforces it.
    """

    def __init__(
        self,
        rules: Sequence[Assignment],
        variables: Sequence[keras.Variable],
        update_is_scaled_gradient: bool = True,
    ) -> None:
        self.variables = list(variables)
        units = units_of(self.variables)
        programs = arithmetic.Programs(self.variables)
        parts = [_Enforced(rule, self.variables, units, programs) for rule in rules]
        self._parts = parts
        late = [p.clipper.stage == "update" and not update_is_scaled_gradient for p in parts]
        self._on_gradients = [p for p, is_late in zip(parts, late, strict=True) if not is_late]
        self._on_updates = [p for p, is_late in zip(parts, late, strict=True) if is_late]

    @property
    def limits_updates(self) -> bool:
        """Whether `clip_updates` has anything to do."""
        return bool(self._on_updates)

    def limited_updates(self) -> set[int]:
        """Positions of the variables whose update may be limited."""
        return {part.members[i] for part in self._on_updates for i in part.limited()}

    def init(self) -> dict[str, object]:
        """The state before the first update: name to NumPy array."""
        return {
            part.name + name: value for part in self._parts for name, value in part.init().items()
        }

    def clip(
        self, grads: Sequence[Gradient], state: State, hyper: Hyper
    ) -> tuple[list[Gradient], State, ClipStats]:
        """The clipped gradients, the state that changed, and what was clipped.

        Args:
            grads: one a variable, without duplicate rows; None where there is none.
            state: of all rules.
            hyper: of all rules, and "learning_rate" (1 if it is missing).
        """
        return self._apply(self._on_gradients, grads, [None] * len(grads), state, hyper)

    def clip_updates(
        self,
        updates: Sequence[Tensor | None],
        weights: Sequence[Tensor | None],
        state: State,
        hyper: Hyper,
    ) -> tuple[list[Gradient], State, ClipStats]:
        """The same for weight updates; `weights` are those from before the update."""
        return self._apply(self._on_updates, updates, weights, state, hyper, is_update=True)

    def _apply(
        self,
        parts: Sequence[_Enforced],
        grads: Sequence[Gradient],
        weights: Sequence[Tensor | None],
        state: State,
        hyper: Hyper,
        is_update: bool = False,
    ) -> tuple[list[Gradient], State, ClipStats]:
        clipped, new_state = list(grads), dict(state)
        stats: list[tuple[Sequence[int], ClipStats]] = []
        for part in parts:
            outcome, part_state, part_stats = part.apply(clipped, weights, state, hyper, is_update)
            for i, gradient in zip(part.members, outcome, strict=True):
                clipped[i] = gradient
            new_state.update({part.name + name: value for name, value in part_state.items()})
            stats.append((part.members, part_stats))
        return clipped, new_state, combined(stats, self.variables)


class _Enforced:
    """One rule, with what is known of its variables before the first update."""

    def __init__(
        self,
        rule: Assignment,
        variables: Sequence[keras.Variable],
        units: Sequence[Unit],
        programs: arithmetic.Programs,
    ) -> None:
        self.name, self.clipper, self.members, self.calls_apply = rule
        self.everything, self.programs = variables, programs
        self.variables = [variables[i] for i in self.members]
        given = dict(self.clipper.axes or ())
        self.units = [
            units[i]._replace(axes=given.get(path_of(variables[i]), units[i].axes))
            for i in self.members
        ]
        self.by_norm = self.clipper.scope in SCOPES
        self.scopes = scope_numbers(self.clipper.scope, self.variables) if self.by_norm else []
        self.state_names = tuple(self.init())

    def init(self) -> dict[str, object]:
        """The rule's state before the first update."""
        if self.calls_apply:
            return self.clipper.init(self.variables)
        return self.clipper.memory(max(self.scopes, default=-1) + 1)

    def limited(self) -> list[int]:
        """Members that have a limit, whether or not there is a gradient."""
        everybody = list(range(len(self.members)))
        return everybody if self.calls_apply else [*self.in_scope(), *self.by_kernel()]

    def in_scope(self) -> list[int]:
        """Members that are limited over the clipper's scope."""
        own = self.clipper.biases == "own"
        return [k for k, unit in enumerate(self.units) if own or not unit.is_bias]

    def by_kernel(self) -> list[int]:
        """Biases that are limited, element by element, by their units in the layer's kernel."""
        if self.clipper.biases != "unit":
            return []
        return [k for k, unit in enumerate(self.units) if unit.is_bias and unit.kernel is not None]

    def apply(
        self,
        grads: Sequence[Gradient],
        weights: Sequence[Tensor | None],
        state: State,
        hyper: Hyper,
        is_update: bool,
    ) -> tuple[list[Gradient], State, ClipStats]:
        """Clip the members' gradients, or updates."""
        own_grads = [grads[i] for i in self.members]
        own_state = {name: state[self.name + name] for name in self.state_names}
        own_hyper = {name: hyper[self.name + name] for name in self.clipper.hyperparameters()}
        rate = hyper.get(LEARNING_RATE, ops.ones((), "float32"))
        if self.calls_apply:
            own_hyper[LEARNING_RATE] = ops.ones((), "float32") if is_update else rate
            return self.clipper.apply(own_grads, self.variables, own_state, own_hyper)
        own_hyper[LEARNING_RATE] = rate
        own_state, own_hyper = self.clipper.advance(own_state, own_hyper)
        divisor = rate if self.clipper.stage == "update" and not is_update else None
        update = _Update(self, own_grads, weights, own_hyper, divisor)
        if self.by_norm:
            own_state = update.clip_norms(self.in_scope(), own_state)
        elif self.clipper.scope == "unit":
            update.clip_units(self.in_scope())
        else:
            update.clip_elements(self.in_scope())
        update.clip_biases(self.by_kernel())
        return update.clipped, own_state, update.stats()


class _Update:
    """One rule in one update.

    Args:
        rule: the rule.
        grads: of the rule's variables.
        weights: of all variables of the model; None to read the variable.
        hyper: the rule's own.
        divisor: what limits are divided by, or None: the learning rate, where a limit on the
            update of SGD is enforced on its gradient.

    Attributes:
        clipped: the clipped gradients.
    """

    def __init__(
        self,
        rule: _Enforced,
        grads: Sequence[Gradient],
        weights: Sequence[Tensor | None],
        hyper: Hyper,
        divisor: Tensor | None,
    ) -> None:
        self.rule, self.clipper, self.grads, self._weights = rule, rule.clipper, grads, weights
        self._hyper, self._divisor = hyper, divisor
        self.clipped = list(grads)
        self._sizes = [size_of(v) for v in rule.variables]
        self._counts = [0.0] * len(grads)
        self._squares: list[Tensor | None] = [None] * len(grads)
        self._fractions: list[Callable[[], Mapping[int, Tensor]]] = []

    def stats(self) -> ClipStats:
        """What was clipped."""

        def fractions() -> list[Tensor | None]:
            known = {k: f for function in self._fractions for k, f in function().items()}
            return [known.get(k) for k in range(len(self.grads))]

        unit = "elements" if self.clipper.scope == "element" else "norms"
        return ClipStats(fractions, self._counts, unit, self._squares)

    def clip_elements(self, members: Sequence[int]) -> None:
        """G' = clip(g, −L, L), then the rescale."""
        for k in self._present(members):
            weight = self._rows(k)
            is_costly = len(self._limit(weight).shape) > 0  # a limit for each element
            self._set(k, self._run(_clip_elements, k, weight, is_costly))
            self._counts[k] = float(self._sizes[k])
        self._count_elements(self._present(members), self._rows)

    def clip_biases(self, members: Sequence[int]) -> None:
        """G' = clip(g, −L, L), L from the norm of each element's unit in the layer's kernel."""
        for k in self._present(members):
            self._set(k, self._run(_clip_elements, k, self._unit_of_bias(k), False))
            self._counts[k] = float(self._sizes[k]) if self.clipper.scope == "unit" else 1.0
        self._count_elements(self._present(members), self._unit_of_bias)

    def _count_elements(self, members: Sequence[int], weight: Callable[[int], Weight]) -> None:
        def fractions() -> dict[int, Tensor]:
            xs = [self._values(k) for k in members]
            limits = [self._limit(weight(k)) for k in members]
            shares = arithmetic.fractions_over(xs, limits, [self._sizes[k] for k in members])
            return dict(zip(members, shares, strict=True))

        self._fractions.append(fractions)

    def clip_units(self, members: Sequence[int]) -> None:
        """g'_u = g_u·min(1, L_u/‖g_u‖) for each unit u."""
        members = self._present(members)
        single: list[int] = []  # variables of one unit share their operations
        for k in members:
            axes = self.rule.units[k].axes
            self._counts[k] = number_of_units(self.rule.variables[k], axes)
            if len(axes) == len(self.rule.variables[k].shape) and self._sizes[k] < arithmetic.SMALL:
                single.append(k)
            else:
                self._set(k, self._run(_clip_units, k, self._unit(k), True))
        if single:
            squares = ops.stack([arithmetic.sum_of_squares(self._values(k)) for k in single])
            weights = ops.stack([self._unit(k).square for k in single])
            factors = arithmetic.clip_factor(ops.sqrt(squares), self._limit(Weight(square=weights)))
            parts = zip(
                ops.unstack(squares, num=len(single)),
                ops.unstack(factors, num=len(single)),
                strict=True,
            )
            for k, (square, factor) in zip(single, parts, strict=True):
                self._squares[k] = square
                self._set(k, arithmetic.scale(self._values(k), factor))

        def fractions() -> dict[int, Tensor]:
            result = {}
            for k in members:
                axes = self.rule.units[k].axes
                norm = ops.sqrt(arithmetic.unit_squares(self._values(k), axes))
                over = ops.sum(arithmetic.float32(norm > self._limit(self._unit(k))))
                result[k] = over / max(self._counts[k], 1.0)
            return result

        self._fractions.append(fractions)

    def clip_norms(self, members: Sequence[int], state: State) -> State:
        """G' = g·min(1, L/‖g‖), ‖·‖ over a variable, a layer or everything; the new state."""
        members = self._present(members)
        for k in members:
            self._squares[k] = arithmetic.sum_of_squares(self._values(k))
        if not members:
            return state
        of_scope: dict[int, list[int]] = {}
        for k in members:
            of_scope.setdefault(self.rule.scopes[k], []).append(k)
        squares = {s: _total([self._squares[k] for k in of]) for s, of in of_scope.items()}
        if type(self.clipper).limits is Limit.limits:
            weights = [self._weights_of(of) for of in of_scope.values()]
            limits = [self._limit(weight) for weight in weights]
            sizes = [weight.size for weight in weights]
            all_factors = arithmetic.clip_factors([*squares.values()], limits, sizes)
            factors = dict(zip(squares, all_factors, strict=True))
        else:
            factors, state = self._remembered(squares, state)
        for s, of in of_scope.items():
            for k in of:
                x = self._values(k)
                y = arithmetic.scale(x, factors[s])
                self._set(k, arithmetic.rescaled(self.clipper.rescale, x, y))
                self._counts[k] = 1.0 / len(of)

        def fractions() -> dict[int, Tensor]:
            hit = ops.unstack(
                arithmetic.float32(ops.stack(list(factors.values())) < 1.0), num=len(factors)
            )
            of = dict(zip(factors, hit, strict=True))
            return {k: of[self.rule.scopes[k]] for k in members}

        self._fractions.append(fractions)
        return state

    def _remembered(
        self, squares: Mapping[int, Tensor], state: State
    ) -> tuple[dict[int, Tensor], State]:
        """Factors by a clipper with memory, which sees all scopes at once, and the new state."""
        zero = ops.zeros((), "float32")
        number = max(self.rule.scopes) + 1
        norms = ops.sqrt(ops.stack([squares.get(s, zero) for s in range(number)]))
        usable = ops.logical_and(ops.isfinite(norms), norms > 0)
        # What is not usable must not get near the arithmetic of the memory: 0·inf is NaN.
        safe = ops.where(usable, norms, ops.zeros_like(norms))
        limits, state = self.clipper.limits(safe, usable, state, self._hyper)
        factors = arithmetic.clip_factor(norms, ops.clip(limits, arithmetic.TINY, NO_LIMIT))
        return dict(enumerate(ops.unstack(factors, num=number))), state

    # What the three need -----------------------------------------------------------------------

    def _present(self, members: Sequence[int]) -> list[int]:
        return [k for k in members if self.grads[k] is not None]

    def _values(self, k: int) -> Tensor:
        return arithmetic.values(self.grads[k])

    def _set(self, k: int, values: Tensor) -> None:
        self.clipped[k] = arithmetic.with_values(self.grads[k], values)

    def _limit(self, weight: Weight) -> Tensor:
        return _limit(self.clipper, weight, self._hyper, self._divisor)

    def _run(self, function: PerVariable, k: int, weight: Weight, is_costly: bool) -> Tensor:
        """`function` of one gradient: compiled where it is costly and large."""
        x, axes = self._values(k), self.rule.units[k].axes
        if is_costly and self.rule.programs.pays(x):

            def compiled(x: Tensor, weight: Tensor, hyper: Hyper, divisor: Tensor | None) -> Tensor:
                of = Weight([lambda: weight], self._sizes[k], axes)
                return function(self.clipper, axes, x, of, hyper, divisor)

            key = (self.rule.name, function, axes)
            arguments = (weight.values, self._hyper, self._divisor)
            return self.rule.programs.run(key, compiled, x, *arguments)
        return function(self.clipper, axes, x, weight, self._hyper, self._divisor)

    def _read(self, i: int) -> Tensor:
        """The weight of variable `i` of the model."""
        given = self._weights[i]
        return arithmetic.read(self.rule.everything[i]) if given is None else given

    def _rows(self, k: int) -> Weight:
        """The part of a weight that lines up with its gradient's values."""

        def read() -> Tensor:
            return arithmetic.matching_rows(self._read(self.rule.members[k]), self.grads[k])

        return Weight([read], self._sizes[k])

    def _unit(self, k: int) -> Weight:
        """The units of a kernel; of a sparse gradient's rows, unless a unit spans rows."""
        axes = self.rule.units[k].axes

        def read() -> Tensor:
            weight = self._read(self.rule.members[k])
            return weight if 0 in axes else arithmetic.matching_rows(weight, self.grads[k])

        return Weight([read], self._sizes[k], axes)

    def _weights_of(self, members: Sequence[int]) -> Weight:
        reads = [functools.partial(self._read, self.rule.members[k]) for k in members]
        return Weight(reads, sum(self._sizes[k] for k in members))

    def _unit_of_bias(self, k: int) -> Weight:
        return Weight(square=self.rule.units[k].square_for_bias(self._read))


def _total(squares: Sequence[Tensor]) -> Tensor:
    return squares[0] if len(squares) == 1 else ops.sum(ops.stack(squares))


#: The clip of one gradient: `_clip_elements` or `_clip_units`.
PerVariable = Callable[[Limit, Sequence[int], Tensor, Weight, Hyper, "Tensor | None"], Tensor]


def _limit(clipper: Limit, weight: Weight, hyper: Hyper, divisor: Tensor | None) -> Tensor:
    limit = clipper.limit(weight, hyper)
    if divisor is not None:
        limit = limit / ops.maximum(divisor, arithmetic.TINY)
    return limit


def _clip_elements(
    clipper: Limit,
    axes: Sequence[int],
    x: Tensor,
    weight: Weight,
    hyper: Hyper,
    divisor: Tensor | None,
) -> Tensor:
    del axes
    y = arithmetic.clip_symmetric(x, _limit(clipper, weight, hyper, divisor))
    if clipper.rescale == "alpha":
        return arithmetic.scale(y, clipper.growth(weight, hyper))
    return arithmetic.rescaled(clipper.rescale, x, y)


def _clip_units(
    clipper: Limit,
    axes: Sequence[int],
    x: Tensor,
    weight: Weight,
    hyper: Hyper,
    divisor: Tensor | None,
) -> Tensor:
    norm = ops.sqrt(arithmetic.unit_squares(x, axes))
    return arithmetic.scale(
        x, arithmetic.clip_factor(norm, _limit(clipper, weight, hyper, divisor))
    )


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
