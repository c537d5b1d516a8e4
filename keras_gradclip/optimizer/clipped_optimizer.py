"""`ClippedOptimizer`: clips, around any Keras optimizer, what that optimizer applies.

One update, in this order: add up micro-batches; sum over the replicas (one all-reduce); merge
duplicate sparse rows; unscale; skip if anything is not finite; clip; rescale; show it to the
watchers; inner optimizer. Where it pays, a clip waits for the inner optimizer and is done with its
update (`_deferred`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import keras
from keras import ops

from keras_gradclip import _aggregation as aggregation
from keras_gradclip import _kernels as kernels
from keras_gradclip import _validation as validation
from keras_gradclip._deferred import LATER, is_bound
from keras_gradclip._types import Gradient, Gradients, Optimizer, State, Tensor, Variable
from keras_gradclip.clippers.base import (
    GRADIENTS,
    LEARNING_RATE,
    PASS,
    STEPS,
    Clipper,
    as_clipper,
    combined,
)
from keras_gradclip.optimizer._accumulation import Accumulation
from keras_gradclip.optimizer._advice import AUTO
from keras_gradclip.optimizer._call import Call, collect
from keras_gradclip.optimizer._inner import (
    DelegatesToInner,
    InnerUpdate,
    check_inner,
    split_overwriting,
)
from keras_gradclip.optimizer._loss_scale import FixedLossScale, KnowsLossScale, LossScale
from keras_gradclip.optimizer._skips import ReportsSkips, SpikeWindow
from keras_gradclip.optimizer._state import HasState
from keras_gradclip.optimizer._steps import BoundsSteps
from keras_gradclip.optimizer._telemetry import ReportsTelemetry, Telemetry
from keras_gradclip.optimizer._watcher import ClippedUpdate, Watched, Watcher


@keras.saving.register_keras_serializable(package="keras_gradclip")
class ClippedOptimizer(
    DelegatesToInner,
    KnowsLossScale,
    ReportsTelemetry,
    ReportsSkips,
    HasState,
    BoundsSteps,
    Watched,
    keras.optimizers.Optimizer,
):
    """Wraps an optimizer so that it applies clipped gradients.

    The clip sees the gradient that will be applied: accumulated, summed over all replicas,
    unscaled. It works in any `keras.Model` and in custom loops, and behaves as the inner
    optimizer does to everything around it.

    ```python
    optimizer = ClippedOptimizer(keras.optimizers.AdamW(1e-3), AbsoluteClip(0.1))
    model.compile(optimizer=optimizer, loss="mse")
    ```

    Args:
        inner_optimizer: a Keras optimizer, or its name. It must not clip or accumulate by
            itself, and belongs to the wrapper from now on.
        clipper: a clipper, anything that `keras_gradclip.get` takes, None (clip nothing), or
            "auto": what suits this optimizer and network, chosen when the variables are known. A
            line of log, of the logger "keras_gradclip", says what and why.
        gradient_accumulation_steps: None, or the number of calls whose gradients are averaged
            into one update. The clip sees the average. Learning-rate schedules count updates.
        skip_nonfinite: leave out an update if its gradient has an infinity or a NaN on any
            replica, and count it in `skipped_steps`. Under mixed_float16 this always happens,
            and the loss scale falls.
        skip_spikes: σ, a number such as 6: leave out an update, on every replica, whose global
            norm is above mean + σ·std of the last 128 norms (once 64 of them were seen), and
            count it in `skipped_steps`. What is not finite is then left out as well.
        telemetry: keep the figures that `read_telemetry` returns; True takes them at every
            update, which costs two or three more passes over the gradients, an int n at every
            n-th, from the first after a reset on. `ClippedModel` turns it on, with n = 8.
        name: the optimizer's name.
        compiled: "auto" runs the inner optimizer's update by one kernel a variable, or by XLA,
            with the clip on its way, where this is legal and pays; True insists, and False leaves
            it to Keras. The results are the same to rounding. The property `compiled` tells what
            happens.

    Raises:
        ValueError: an inner optimizer with its own clipping or accumulation, a
            LossScaleOptimizer or another ClippedOptimizer inside, a strategy that is not
            supported (CentralStorage, ParameterServer, TPU), or a wrong argument.
    """

    def __init__(
        self,
        inner_optimizer: Optimizer | str,
        clipper: Clipper | str | dict | None = None,
        gradient_accumulation_steps: int | None = None,
        skip_nonfinite: bool = False,
        telemetry: bool | int = False,
        name: str | None = None,
        *,
        compiled: bool | str = "auto",
        skip_spikes: float | None = None,
    ) -> None:
        inner_optimizer = check_inner(inner_optimizer, ClippedOptimizer)
        is_auto = isinstance(clipper, str) and clipper == AUTO
        clipper = as_clipper(
            "ClippedOptimizer", "clipper", None if is_auto else clipper, optional=True
        )
        steps = validation.steps(
            "ClippedOptimizer", "gradient_accumulation_steps", gradient_accumulation_steps
        )
        validation.choice("ClippedOptimizer", "skip_nonfinite", skip_nonfinite, (True, False))
        if not isinstance(telemetry, bool):
            validation.steps("ClippedOptimizer", "telemetry", telemetry)
        validation.choice("ClippedOptimizer", "compiled", compiled, ("auto", True, False))
        if skip_spikes is not None:
            skip_spikes = validation.positive("ClippedOptimizer", "skip_spikes", skip_spikes)
        strategy = aggregation.current_strategy()
        aggregation.check_strategy(strategy)
        super().__init__(learning_rate=_delegated, name=name)
        self.skip_nonfinite = skip_nonfinite
        self.skip_spikes = skip_spikes
        self._spikes = SpikeWindow(skip_spikes) if skip_spikes else None
        self._strategy = strategy
        self._inner_update = InnerUpdate(inner_optimizer, self._strategy, compiled)
        self.inner_optimizer = inner_optimizer
        self._static_scale: LossScale = FixedLossScale(inner_optimizer)
        self.gradient_accumulation_steps = steps
        self._accumulation = Accumulation(steps) if steps and steps > 1 else None
        self._is_auto = is_auto
        self._set_clipper(clipper)
        self._check_learning_rate()
        self._telemetry: Telemetry | None = None
        self._watchers: tuple[Watcher, ...] = ()
        self.keep_for(None)
        self.telemetry = telemetry
        self.set_frozen_variables(())

    # What the outside sees ------------------------------------------------------------------

    @property
    def compiled(self) -> str:
        """Whether the update is compiled: "yes", "no: reason", or "yes, except" what and why.

        What is known of the gradients alone (sparse rows) is known after the first update.
        """
        return str(self._inner_update.compiled)

    def set_frozen_variables(self, variables: Sequence[Variable]) -> None:
        """Name variables that are not trained now, for a ClipMap's rules to match.

        Those of the network around the variables that the optimizer is built with are known.
        """
        # Past Keras, which would take them for variables of the optimizer.
        object.__setattr__(self, "_frozen_variables", tuple(variables))

    # One update -----------------------------------------------------------------------------

    def apply(
        self, grads: Sequence[Gradient], trainable_variables: Sequence[Variable] | None = None
    ) -> None:
        """Clip and apply gradients; to be called in replica context.

        Args:
            grads: one gradient a variable; None, and `tf.IndexedSlices`, are allowed.
            trainable_variables: the variables; None for those that the optimizer was built with.

        Raises:
            ValueError: unknown variables, no gradient at all, or cross-replica context.
        """
        self._apply(grads, trainable_variables, self._static_scale)

    def _apply(
        self,
        grads: Sequence[Gradient],
        trainable_variables: Sequence[Variable] | None,
        scale: LossScale,
    ) -> None:
        grads = list(grads)
        if not grads:
            return
        gradients, indices = collect(self, grads, trainable_variables)
        call = Call(indices, scale)
        if self._accumulation is None:
            self._update(call, gradients)
        else:
            self._accumulation.add(gradients)
            aggregation.cond(
                self._accumulation.is_due(self._iterations),
                functools.partial(self._update_accumulated, call, gradients),
                lambda: None,
                state=self._written(),
            )
        self._iterations.assign_add(1)

    def _written(self) -> list[Variable]:
        """Every variable that an update may write."""
        return [*self._trainable_variables, *self.variables]

    def _update_accumulated(self, call: Call, gradients: Gradients) -> None:
        sums = self._accumulation
        assert sums is not None
        others = sums.others(call.indices, gradients)
        added = [i for i, g in enumerate(gradients) if g is not None]
        indices = sorted({*added, *others})
        call = dataclasses.replace(call, indices=indices, if_present=others)
        self._update(call, sums.take(indices))
        sums.clear(indices)

    def _update(self, call: Call, gradients: Gradients) -> None:
        """Reduce, merge, unscale; then step or skip."""
        gradients, overwriting = split_overwriting(gradients, self._trainable_variables)
        gradients = aggregation.all_reduce_sum(gradients)
        gradients = [kernels.merge_duplicate_rows(g) for g in gradients]
        micro_steps = self._accumulation.steps if self._accumulation else 1
        gradients = kernels.divided(gradients, micro_steps * call.scale.factor())
        if not (self.skip_nonfinite or self._spikes or call.scale.checks_finite):
            self._step(call, gradients, overwriting, call.if_present)
            return
        if self._spikes is None:
            is_kept = kernels.all_finite(gradients)
        else:
            is_kept = ops.logical_not(self._spikes.is_spike(gradients))
        aggregation.cond(
            is_kept,
            functools.partial(self._step, call),
            functools.partial(self._skip, call),
            (gradients, overwriting, dict(call.if_present)),
            state=self._written(),
        )

    def _step(
        self,
        call: Call,
        gradients: Gradients,
        overwriting: Gradients,
        if_present: Mapping[int, Tensor],
    ) -> None:
        """Clip, show, apply."""
        update = self._clip(gradients, may_wait=not if_present)
        bound = self._bound_by(functools.partial(self._bound, update))
        if bound is None:
            self._show(update)
        self._inner_update(
            update.clipped,
            overwriting,
            self._trainable_variables,
            call.indices,
            bound,
            {id(self._trainable_variables[i]): flag for i, flag in if_present.items()},
        )
        call.scale.on_finite()

    def _bound(
        self, update: ClippedUpdate, variables: Sequence[Variable], steps: list[Tensor]
    ) -> list[Tensor]:
        """Clip the steps that the inner optimizer is about to take, and show what was clipped."""
        assert self._clipper is not None and update.stats is not None
        indices = [self._get_variable_index(v) for v in variables]
        everything = [g if is_bound(g) else None for g in update.clipped]
        for i, step in zip(indices, steps, strict=True):
            everything[i] = step
        hyper = {**update.hyper, LEARNING_RATE: ops.ones((), "float32"), PASS: STEPS}
        clipped, _, stats = self._clipper.in_its_pass(
            everything, self._trainable_variables, self._read_clip_state(), hyper
        )
        both = combined([update.stats, stats], self._trainable_variables)
        self._show(dataclasses.replace(update, stats=both))
        return [clipped[i] for i in indices]

    def _show(self, update: ClippedUpdate) -> None:
        for watcher in self._all_watchers:
            watcher.on_update(update)

    def _skip(self, call: Call, gradients: Gradients, *unused: object) -> None:
        """Leave the update out on every replica: not finite, or a spike."""
        del unused
        self._skipped.assign(self._skipped + 1)
        self._first_nonfinite.note(gradients)
        for watcher in self._all_watchers:
            watcher.on_skip(gradients)
        call.scale.on_skip(kernels.all_finite(gradients))

    def _clip(self, gradients: Gradients, may_wait: bool) -> ClippedUpdate:
        if self._clipper is None:
            return ClippedUpdate(gradients, gradients, None, {})
        hyper = self.clip_hyperparameters.at_this_step()
        told = {**hyper, **self._told_learning_rate()}
        if self._bounds_steps:
            told[PASS] = GRADIENTS
        # Whoever else watches wants to see what was clipped.
        if self._clipper.defers and may_wait and not self._watchers:
            told[LATER] = self._inner_update.may_wait(gradients, self._trainable_variables)
        clipped, state, stats = self._clipper.in_its_pass(
            gradients, self._trainable_variables, self._read_clip_state(), told
        )
        for key, value in state.items():
            self._clip_state[key].assign(value)
        return ClippedUpdate(gradients, clipped, stats, hyper)

    def _read_clip_state(self) -> State:
        return {key: kernels.read(v) for key, v in self._clip_state.items()}

    @property
    def _all_watchers(self) -> list[Watcher]:
        return [*self._watchers, *([self._telemetry] if self._telemetry else [])]


def find(optimizer: Optimizer | None) -> ClippedOptimizer | None:
    """The ClippedOptimizer that `optimizer` is, or wraps; None if there is none."""
    while optimizer is not None and not isinstance(optimizer, ClippedOptimizer):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer


def find_all(optimizer: Optimizer | None) -> list[ClippedOptimizer]:
    """What `find` finds, or each that a `keras.optimizers.MultiOptimizer` gives variables to."""
    wrapper = find(optimizer)
    if wrapper is not None:
        return [wrapper]
    while inner := getattr(optimizer, "inner_optimizer", None):
        optimizer = inner
    return [found for part in getattr(optimizer, "optimizers", ()) for found in find_all(part)]


def _delegated() -> float:
    """Stands for the wrapper's own learning rate, which nobody reads: see `learning_rate`."""
    return 0.0
