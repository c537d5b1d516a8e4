"""A watcher that samples chosen figures of each variable on the device."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import keras
import numpy as np
from keras import backend, ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _compat, aggregation
from keras_gradclip._types import Gradient, Scalar, Tensor
from keras_gradclip.clippers.units import unit_of
from keras_gradclip.optimizer._watcher import ClippedUpdate
from keras_gradclip.optimizer.clipped_optimizer import ClippedOptimizer, find_all

#: Updates per batch that the buffer has room for: a `train_step` may make more than one.
UPDATES_IN_A_BATCH = 16


class VariableUpdate:
    """One variable in an update; each figure is a float32 scalar, computed on demand.

    Args:
        variable: the variable, before the update.
        before: its gradient before the clip.
        after: its gradient after the clip.
        fraction: the share that was clipped, 0..1; None for none.
    """

    def __init__(
        self, variable: keras.Variable, before: Gradient, after: Gradient, fraction: Scalar | None
    ) -> None:
        self._variable, self._gradient = variable, before
        self._before = arithmetic.float32(arithmetic.values(before))
        self._after = arithmetic.float32(arithmetic.values(after))
        self.clip_fraction = ops.zeros((), "float32") if fraction is None else fraction

    @functools.cached_property
    def norm_before(self) -> Tensor:
        """The L2 norm before the clip."""
        return ops.sqrt(arithmetic.sum_of_squares(self._before))

    @functools.cached_property
    def norm_after(self) -> Tensor:
        """The L2 norm after the clip."""
        return ops.sqrt(arithmetic.sum_of_squares(self._after))

    @property
    def angle(self) -> Tensor:
        """The degrees by which the clip turns the gradient; 0 if there is nothing before or after.

        From the chord, which is precise for small angles, unlike the cosine.
        """
        x = self._before / ops.maximum(self.norm_before, arithmetic.TINY)
        y = self._after / ops.maximum(self.norm_after, arithmetic.TINY)
        chord = ops.sqrt(arithmetic.sum_of_squares(x - y))
        degrees = ops.arcsin(ops.minimum(chord / 2.0, 1.0)) * (360.0 / math.pi)
        return ops.where(ops.equal(self.norm_before * self.norm_after, 0.0), 0.0, degrees)

    @property
    def max_abs(self) -> Tensor:
        """The largest |g| before the clip."""
        return arithmetic.max_abs(self._before)

    def largest_scaled_element(self, beta: float) -> Tensor:
        """The largest |g|·exp(−β·W)."""
        scale = arithmetic.exp_of(beta, self._weight)
        return arithmetic.max_abs(ops.abs(self._before) / scale)

    def unit_ratio(self, eps: float) -> Tensor:
        """The largest ratio of a unit's gradient norm to its weight norm (at least ε)."""
        unit = ops.sqrt(arithmetic.unit_squares(self._before, unit_of(self._variable).axes))
        return arithmetic.max_abs(unit / self._unit_norms(eps))

    def sign_step(self, eps: float) -> Tensor:
        """The largest `unit_ratio` for a step of 1 per element."""
        size = math.prod(int(self._variable.shape[axis]) for axis in unit_of(self._variable).axes)
        return arithmetic.max_abs(math.sqrt(size) / self._unit_norms(eps))

    def _unit_norms(self, eps: float) -> Tensor:
        axes = unit_of(self._variable).axes
        whole = self._weight
        if 0 in axes:  # units also span rows that a sparse gradient lacks
            whole = arithmetic.float32(ops.convert_to_tensor(self._variable))
        return ops.maximum(ops.sqrt(arithmetic.unit_squares(whole, axes)), eps)

    @functools.cached_property
    def _weight(self) -> Tensor:
        """The weights for which the gradient has values."""
        weight = arithmetic.read(self._variable)
        return arithmetic.float32(arithmetic.matching_rows(weight, self._gradient))


#: Computes a figure of one variable.
Figure = Callable[[VariableUpdate], Scalar]


class Sample(NamedTuple):
    """One update sampled by a `Sampler`.

    Attributes:
        step: the number of updates before it.
        figures: a float64 array `[variables]` by name; 0 without a gradient.
        updates: the number of updates since the last sample, this one included.
        skipped: for each variable the share of `updates` that were skipped and in which its
            gradient was not finite.
        learning_rate: the inner optimizer's; 0 if it has none.
        thresholds: the thresholds in force, by name.
    """

    step: int
    figures: dict[str, np.ndarray]
    updates: int
    skipped: np.ndarray
    learning_rate: float
    thresholds: dict[str, float]


class Sampler:
    """A `Watcher` that samples one update in `every`.

    Samples are stored in a ring buffer on the device, which the host fetches now and then. An
    optimizer that is not built yet is sampled from its first update on.

    Args:
        owner: name of the caller, for a warning.
        optimizer: the optimizer to sample.
        figures: the functions computed for each variable, by name.
        batches: the largest number of batches between two fetches.
        every: sample the updates whose number is a multiple of it.
    """

    def __init__(
        self,
        owner: str,
        optimizer: ClippedOptimizer,
        figures: Mapping[str, Figure],
        batches: int,
        every: int = 1,
    ) -> None:
        self._owner, self.optimizer, self.figures = owner, optimizer, dict(figures)
        self._capacity = UPDATES_IN_A_BATCH * batches // every + 4
        self.every = every
        self.state: list[keras.Variable] = []
        self.start = 0  # the number of earlier updates
        self._is_warned = False
        if optimizer.built:
            self._build()
            self.start = int(aggregation.to_numpy(optimizer.iterations))

    def _build(self) -> None:
        self.variables = _compat.trainable_variables(self.optimizer)
        self._thresholds = list(self.optimizer.clip_hyperparameters)
        count, slots = len(self.variables), self._capacity
        with strategy_scope(self.optimizer):
            # Updates so far, skipped ones included; for each variable those of the skipped ones
            # in which its gradient was not finite.
            self._counts = aggregation.counter((1 + count,), "sampler_counts")
            self._has_sample = aggregation.zeros((), "has_sample")  # any since the last `force`
            self._written = aggregation.counter((), "written")  # samples so far
            self._buffer = {
                "step": aggregation.counter((slots,), "steps"),
                "counts": aggregation.counter((slots, 1 + count), "counts"),
                "figures": aggregation.zeros((slots, len(self.figures), count), "figures"),
                # The learning rate and the thresholds.
                "scalars": aggregation.zeros((slots, 1 + len(self._thresholds)), "scalars"),
            }
        self._fetched, self._fetched_counts = 0, np.zeros(1 + count, "int64")
        self.state = [self._written, *self._buffer.values(), self._has_sample, self._counts]

    def _build_where_traced(self) -> None:
        if not self.state:
            with aggregation.outside_of_traces(_compat.trainable_variables(self.optimizer)):
                self._build()

    def force(self) -> None:
        """Makes the next update a sample, whatever its number."""
        if self.state:
            self._has_sample.assign(0.0)

    # On the device ---------------------------------------------------------------------------

    def on_skip(self, gradients: Sequence[Gradient | None]) -> None:
        """Counts the update and its non-finite gradients."""
        self._build_where_traced()
        is_finite = [g is None or arithmetic.all_finite([g]) for g in gradients]
        self._count(ops.stack([True, *map(ops.logical_not, is_finite)]))

    def _count(self, what: Tensor | np.ndarray) -> None:
        """Adds booleans `[1 + variables]` to the counts."""
        self._counts.assign(self._counts + ops.cast(what, self._counts.dtype))

    def on_update(self, update: ClippedUpdate) -> None:
        """Takes a sample if this update is due."""
        self._build_where_traced()
        self._count(np.arange(1 + len(self.variables)) == 0)
        if self.every == 1:
            self._sample(update)
            return
        inner = self.optimizer.inner_optimizer
        is_due = ops.equal(arithmetic.read(inner.iterations) % self.every, 0)
        aggregation.cond(
            ops.logical_or(is_due, self._has_sample < 1),
            functools.partial(self._sample, update),
            state=self.state,
            reads=[*self.variables, *inner.variables],
            merges=False,
        )

    def _sample(self, update: ClippedUpdate) -> None:
        fractions = update.stats.fractions() if update.stats else [None] * len(self.variables)
        parts = zip(self.variables, update.gradients, update.clipped, fractions, strict=True)
        inner = self.optimizer.inner_optimizer
        rate = getattr(inner, "learning_rate", None)
        scalars = [
            arithmetic.float32(0.0 if rate is None else arithmetic.read(rate)),
            *(update.hyper[name] for name in self._thresholds),
        ]
        record = {
            "step": arithmetic.read(inner.iterations),
            "counts": arithmetic.read(self._counts),
            "figures": ops.stack([self._column(*part) for part in parts], axis=1),
            "scalars": ops.stack(scalars),
        }
        written = arithmetic.read(self._written)
        is_slot = ops.equal(
            ops.arange(self._capacity, dtype=written.dtype), written % self._capacity
        )
        for name, variable in self._buffer.items():
            value = ops.cast(record[name], variable.dtype)[None]
            mask = ops.reshape(is_slot, (-1, *(1 for _ in variable.shape[1:])))
            variable.assign(ops.where(mask, value, arithmetic.read(variable)))
        self._written.assign(written + 1)
        self._has_sample.assign(ops.ones(()))

    def _column(
        self, variable: keras.Variable, before: Gradient, after: Gradient, fraction: Scalar | None
    ) -> Tensor:
        if before is None:
            return ops.zeros((len(self.figures),), "float32")
        part = VariableUpdate(variable, before, after, fraction)
        return ops.stack([figure(part) for figure in self.figures.values()])

    # On the host -----------------------------------------------------------------------------

    def fetch(self) -> list[Sample]:
        """The samples since the last fetch; warns of those that the buffer could not hold."""
        written = self.samples
        new, self._fetched = written - self._fetched, written
        lost = max(new - self._capacity, 0)
        if lost and not self._is_warned:
            self._is_warned = True
            warnings.warn(
                f"{self._owner}: {lost} of {new} updates of one batch were not kept: there is "
                f"room for {self._capacity}. Lower steps_per_execution.",
                stacklevel=2,
            )
        if not new:
            return []
        arrays = {name: np.array(aggregation.to_numpy(v)) for name, v in self._buffer.items()}
        samples = []
        for slot in (i % self._capacity for i in range(written - new + lost, written)):
            rate, *thresholds = arrays["scalars"][slot].tolist()
            figures = arrays["figures"][slot].astype("float64")
            samples.append(
                Sample(
                    int(arrays["step"][slot]),
                    dict(zip(self.figures, figures, strict=True)),
                    *self._skipped_since(arrays["counts"][slot]),
                    rate,
                    dict(zip(self._thresholds, thresholds, strict=True)),
                )
            )
        return samples

    def fetch_skipped(self) -> Sample:
        """A sample without figures: the updates skipped since the last one."""
        inner, thresholds = self.optimizer.inner_optimizer, self.optimizer.clip_hyperparameters
        counts = np.array(aggregation.to_numpy(self._counts))
        step = int(aggregation.to_numpy(inner.iterations))
        return Sample(step, {}, *self._skipped_since(counts), 0.0, {**thresholds})

    def _skipped_since(self, counts: np.ndarray) -> tuple[int, np.ndarray]:
        updates, *nonfinite = counts - self._fetched_counts
        self._fetched_counts = counts
        return int(updates), np.array(nonfinite) / max(updates, 1)

    @property
    def updates(self) -> int:
        """The number of updates so far, skipped ones included."""
        return int(aggregation.to_numpy(self._counts)[0])

    @property
    def samples(self) -> int:
        """The number of samples so far, lost ones included."""
        return int(aggregation.to_numpy(self._written)) if self.state else 0


# Finding the optimizers to watch -----------------------------------------------------------------


def watched_optimizers(
    owner: str,
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer | Sequence[keras.optimizers.Optimizer] | None = None,
) -> list[ClippedOptimizer]:
    """The `ClippedOptimizer`s of a compiled model; a `MultiOptimizer` may have several.

    They are built here if the model is built, otherwise by training.

    Args:
        owner: name of the caller, for messages.
        model: the compiled model.
        optimizer: the optimizer or optimizers to watch instead of the model's.

    Raises:
        ValueError: there is none.
    """
    own: keras.optimizers.Optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        outer = [own]
        if own is not None and model.built and not own.built:
            with strategy_scope(*find_all(own)[:1]):
                own.build(model.trainable_variables)
    else:
        outer = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    wrappers = list({id(found): found for one in outer for found in find_all(one)}.values())
    if not wrappers:
        what = "the model's optimizer" if optimizer is None else "`optimizer`"
        raise ValueError(
            f"{owner}: {what} is {own if optimizer is None else optimizer!r}, which does not clip. "
            "Compile with ClippedOptimizer(inner_optimizer, clipper), or build a ClippedModel; "
            f"clipper=None will do. Where training uses others, name them: {owner}(..., "
            "optimizer=model.generator_optimizer)."
        )
    built = [wrapper for wrapper in wrappers if wrapper.built]
    if built and not any(map(_compat.trainable_variables, built)):
        raise ValueError(
            f"{owner}: the optimizer has no variables, since no weight was trainable when it was "
            "built. Set `trainable=True` on a layer, and compile again."
        )
    # A MultiOptimizer builds only the optimizers that have variables.
    return built if built and optimizer is None else wrappers


def labels_of(optimizers: Sequence[ClippedOptimizer]) -> list[str]:
    """A unique name for each of several optimizers; "" for a single one."""
    if len(optimizers) == 1:
        return [""]
    names = [optimizer.inner_optimizer.name for optimizer in optimizers]
    return [
        name if names.count(name) == 1 else f"{name}#{names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]


def strategy_scope(*optimizers: ClippedOptimizer) -> contextlib.AbstractContextManager:
    """The scope of the optimizer's strategy; an empty context if it has none."""
    strategy = optimizers[0].strategy if optimizers else None
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def sync(model: keras.Model) -> None:
    """Updates the variables of a JAX model, which are stale inside an epoch."""
    if backend.backend() == "jax":
        model.jax_state_sync()
