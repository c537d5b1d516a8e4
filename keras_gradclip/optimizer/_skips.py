"""Spikes: updates whose gradients are finite and far larger than those before."""

from __future__ import annotations

from collections.abc import Callable

import keras
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _validation as validation
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
        sigmas: σ, a positive number.
    """

    def __init__(self, sigmas: float) -> None:
        self.sigmas = validation.positive(
            "ClippedOptimizer", "skip_spikes", sigmas, advice="To skip no spike, pass None."
        )

    def build(self, add_variable: Callable[..., keras.Variable]) -> None:
        """Creates the state; every replica writes the same values to its copy."""
        self.norms = add_variable((WINDOW,), "zeros", "float32", "none", name="spike_norms")
        self.seen = add_variable((), "zeros", "int32", "none", name="spike_norms_seen")

    def saved(self) -> dict[str, keras.Variable]:
        """The variables by their names in files."""
        return {"spikes:norms": self.norms, "spikes:seen": self.seen}

    def add(self, gradients: Gradients) -> Tensor:
        """Stores the norm of these gradients; returns whether to apply them, a boolean scalar.

        A non-finite norm (its elements may be finite) is no spike, but skipped and not stored.
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
        return ops.logical_and(is_finite, ops.logical_not(is_spike))
