"""Micro-batches: gradients are added up where they arise, and averaged once an update."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from keras import ops

from keras_gradclip import _aggregation as aggregation
from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip._types import Gradients, Scalar, Variable


class Accumulation:
    """Sums of gradients since the last update, one a variable, each replica its own.

    Attributes:
        steps: the number of calls that make an update.
        sums: the variables that hold them.
        flags: float32 `[2, variables]`, above 0 in the first row: has ever had a gradient.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.sums: list[Variable] = []
        # A compiled step cannot know which of the calls before it brought a gradient: a variable
        # that has ever had one is part of every update from then on, with what its sum is.
        self._touched: set[int] = set()

    def build(
        self, variables: Sequence[Variable], flags: Variable, track: Callable[[Variable], None]
    ) -> None:
        """Create the sums for `variables`; `track` makes each one known to the optimizer."""
        self._variables = list(variables)
        self.flags = flags
        for i, variable in enumerate(variables):
            total = aggregation.local_variable(variable.shape, variable.dtype, f"accumulator_{i}")
            track(total)
            self.sums.append(total)

    def is_due(self, calls: Variable) -> Scalar:
        """Whether the call after `calls` others completes an update."""
        return ops.equal((calls + 1) % self.steps, 0)

    def add(self, gradients: Gradients) -> None:
        """Add one micro-batch; sparse gradients become dense."""
        self._remember()
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            self._touched.add(i)
            total = self.sums[i]
            gradient = arithmetic.dense(gradient)
            if is_overwritten(self._variables[i]):
                total.assign(ops.maximum(total, gradient))
            else:
                total.assign_add(ops.cast(gradient, total.dtype))
        marks = np.zeros(self.flags.shape, "float32")
        marks[0, self.touched] = 1.0
        self.flags.assign(ops.maximum(arithmetic.read(self.flags), marks))

    def _remember(self) -> None:
        """Learn from the flags, which may come from a file, what has had a gradient.

        When a step is traced, that is; a value that JAX traces tells nothing, but there no
        gradient is ever missing.
        """
        if len(self._touched) < len(self.sums):
            flags = aggregation.concrete_value(self.flags)
            if flags is not None:
                self._touched.update(np.flatnonzero(flags[0] > 0).tolist())

    def mark_from_sums(self) -> None:
        """Set the flags where there is a sum, for files that do not have them."""
        marks = np.zeros(self.flags.shape, "float32")
        marks[0] = [np.any(ops.convert_to_numpy(arithmetic.read(total))) for total in self.sums]
        self.flags.assign(marks)

    @property
    def touched(self) -> list[int]:
        """The positions of the variables that have had a gradient."""
        return sorted(self._touched)

    def take(self) -> Gradients:
        """The sums; None for a variable that never had a gradient."""
        return [
            arithmetic.read(total) if i in self._touched else None
            for i, total in enumerate(self.sums)
        ]

    def clear(self) -> None:
        """Begin the next update."""
        for i in self.touched:
            self.sums[i].assign(ops.zeros(self.sums[i].shape, self.sums[i].dtype))


def is_overwritten(variable: Variable) -> bool:
    """Whether what comes for `variable` is its new value and no gradient: float8 scales."""
    return getattr(variable, "overwrite_with_gradient", False)
