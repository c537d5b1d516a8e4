"""Accumulation: gradients of micro-batches are summed per replica, and averaged at an update."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence

import keras
import numpy as np
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import aggregation
from keras_gradclip._types import Gradients, Scalar, Tensor


class Accumulation:
    """Sums of gradients since the last update, one per variable and replica.

    An update covers only variables that had a gradient since the last one: frozen variables, and
    those that no call named, do not move, not even by momentum or weight decay.

    Attributes:
        steps: the number of calls that make an update.
        sums: the variables that hold them.
        flags: float32 `[2, variables]`; above 0 in the second row: had a gradient since the last
            update. The first row exists for files of version 0.2.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.sums: list[keras.Variable] = []
        self._touched: set[int] = set()  # positions that had a gradient in this process

    def build(
        self,
        variables: Sequence[keras.Variable],
        add_variable: Callable[..., keras.Variable],
        track: Callable[[keras.Variable], None],
    ) -> None:
        """Creates the state; `track` registers a variable with the optimizer."""
        self._variables = list(variables)
        shape = (2, len(self._variables))
        self.flags = add_variable(shape, "zeros", "float32", "none", name="flags")
        # Checkpoints number the variables: 0.1 had its telemetry here.
        add_variable((4,), "zeros", "float32", "none", name="reserved")
        for i, variable in enumerate(variables):
            total = aggregation.local_variable(variable.shape, variable.dtype, f"accumulator_{i}")
            track(total)
            self.sums.append(total)

    def saved(self) -> dict[str, keras.Variable]:
        """The variables by the names that files have for them."""
        return {f"accumulator:{i}": v for i, v in enumerate(self.sums)} | {"touched": self.flags}

    def is_due(self, calls: keras.Variable) -> Scalar:
        """True if the call after `calls` earlier ones completes an update."""
        return ops.equal((calls + 1) % self.steps, 0)

    def add(self, gradients: Gradients) -> None:
        """Adds one micro-batch; sparse gradients become dense."""
        marks = np.zeros(self.flags.shape, "float32")
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            self._touched.add(i)
            marks[1, i] = 1.0
            total = self.sums[i]
            gradient = arithmetic.dense(gradient)
            if is_overwritten(self._variables[i]):
                total.assign(ops.maximum(total, gradient))
            else:
                total.assign_add(ops.cast(gradient, total.dtype))
        self.flags.assign(ops.maximum(arithmetic.read(self.flags), marks))

    def mark_from_sums(self) -> None:
        """Sets the flags from the sums if none is set, since files of 0.1 and 0.2 lack them."""
        if aggregation.to_numpy(self.flags)[1].any():
            return
        marks = np.zeros(self.flags.shape, "float32")
        marks[1] = [
            np.any(ops.convert_to_numpy(arithmetic.float32(arithmetic.read(total))))
            for total in self.sums
        ]
        self.flags.assign(marks)

    def apply(
        self,
        named: Sequence[int],
        gradients: Gradients,
        update: Callable[[list[int], Gradients, dict[int, Tensor]], None],
        state: Sequence[keras.Variable],
    ) -> None:
        """Calls `update` with positions, sums, and flags as in `Conditionally`; clears the sums.

        The flags are those of variables to which only other calls may have added, because a traced
        call does not know the others. `named` are the positions of this call's variables, and
        `state` are the variables that `update` may write.
        """
        known = aggregation.concrete_value(self.flags)  # may come from a file
        touched = self._touched if known is None else {*self._touched, *np.flatnonzero(known[1])}
        others = [
            i
            for i, variable in enumerate(self._variables)
            if gradients[i] is None and getattr(variable, "trainable", True)
        ]
        unused = [i for i in others if i in named and i not in touched]
        flags = arithmetic.read(self.flags)[1]

        def run(others: Collection[int]) -> None:
            indices = sorted({*others, *(i for i, g in enumerate(gradients) if g is not None)})
            sums = [
                arithmetic.read(total) if i in indices else None
                for i, total in enumerate(self.sums)
            ]
            update(indices, sums, {i: flags[i] > 0 for i in others})
            self.clear(indices)

        used = functools.partial(run, [i for i in others if i not in unused])
        if not unused:
            used()
            return
        # A function that is traced later may add to them.
        is_used = ops.any(ops.stack([flags[i] for i in unused]) > 0)
        aggregation.cond(is_used, functools.partial(run, others), used, state=state)

    def clear(self, positions: Iterable[int]) -> None:
        """Clears these sums, and those of variables frozen since."""
        flags = aggregation.concrete_value(self.flags)
        left = range(len(self.sums)) if flags is None else np.flatnonzero(flags[1]).tolist()
        for i in sorted({*positions, *left}):
            self.sums[i].assign(ops.zeros(self.sums[i].shape, self.sums[i].dtype))
        self.flags.assign(ops.zeros(self.flags.shape, self.flags.dtype))


def is_overwritten(variable: keras.Variable) -> bool:
    """True if the gradient of `variable` is really its new value (float8 scales)."""
    return getattr(variable, "overwrite_with_gradient", False)
