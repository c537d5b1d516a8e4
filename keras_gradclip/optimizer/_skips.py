"""Skipped updates: non-finite gradients, and finite spikes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import keras
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import aggregation
from keras_gradclip._types import Gradients, Tensor

#: Window length; no finite norm is a spike before half of it is filled.
WINDOW = 128
#: Smallest standard deviation, as a share of the mean, so that rounding is no spike.
LEAST_DEVIATION = 0.01


class SpikeWindow:
    """A window of global norms before the clip; detects spikes.

    ‖g‖ > mean + σ·std of the last `WINDOW` norms, the rule of OLMo (arXiv 2501.00656) and MaxText.
    A spike is stored as the limit that it exceeded: one spike does not hide the next, and a
    lasting rise of the norms is soon accepted. A norm of 0 (a masked batch, a missing reward) is
    not stored.

    Args:
        sigmas: σ.
    """

    def __init__(self, sigmas: float) -> None:
        self.sigmas = sigmas

    def build(self, add_variable: Callable[..., keras.Variable]) -> None:
        """Creates the state; every replica writes the same values to its copy."""
        self.norms = add_variable((WINDOW,), "zeros", "float32", "none", name="spike_norms")
        self.seen = add_variable((), "zeros", "int32", "none", name="spike_norms_seen")

    def saved(self) -> dict[str, keras.Variable]:
        """The variables by their names in files."""
        return {"spikes:norms": self.norms, "spikes:seen": self.seen}

    def is_spike(self, gradients: Gradients) -> Tensor:
        """Whether to skip these gradients, a boolean scalar; stores their norm.

        A non-finite norm (its elements may be finite) is a spike and is not stored.
        """
        present = [arithmetic.values(g) for g in gradients if g is not None]
        norm = ops.sqrt(ops.sum(ops.stack(arithmetic.sums_of_squares(present))))
        norms, seen = arithmetic.read(self.norms), arithmetic.read(self.seen)
        places = ops.arange(WINDOW, dtype="int32")
        held = arithmetic.float32(places < seen)
        count = ops.maximum(ops.sum(held), 1.0)
        mean = ops.sum(norms) / count
        std = ops.sqrt(ops.sum(held * ops.square(norms - mean)) / count)
        limit = mean + self.sigmas * ops.maximum(std, LEAST_DEVIATION * mean)
        is_spike = ops.logical_and(norm > limit, seen >= WINDOW // 2)
        is_finite = ops.isfinite(norm)
        is_evidence = ops.logical_and(is_finite, norm > 0)
        is_here = ops.logical_and(ops.equal(places, seen % WINDOW), is_evidence)
        self.norms.assign(ops.where(is_here, ops.where(is_spike, limit, norm), norms))
        self.seen.assign(seen + ops.cast(is_evidence, "int32"))
        return ops.logical_or(is_spike, ops.logical_not(is_finite))


class FirstNonfinite:
    """Records the variable whose gradient first had an infinity or NaN."""

    def __init__(self) -> None:
        self.number = aggregation.zeros((), "first_nonfinite", "int32")  # from 1; 0: none yet

    def look(self, gradients: Gradients, squares: Tensor) -> None:
        """Searches these gradients if a squared norm is not finite, until one was found."""
        is_due = ops.logical_and(
            ops.equal(arithmetic.read(self.number), 0),
            ops.logical_not(ops.all(ops.isfinite(squares))),
        )
        aggregation.local_cond(is_due, functools.partial(self.note, gradients), [self.number])

    def note(self, gradients: Gradients) -> None:
        """Searches these gradients."""
        none = float(len(gradients) + 1)
        # A minimum of floats, because GPUs have no op for an argmax of integers.
        numbers = [
            ops.where(arithmetic.all_finite([g]), none, float(i))
            for i, g in enumerate(gradients, start=1)
            if g is not None
        ]
        first = ops.min(ops.stack(numbers))
        number = ops.cast(ops.where(first < none, first, 0.0), "int32")
        before = arithmetic.read(self.number)
        self.number.assign(ops.where(before > 0, before, number))
