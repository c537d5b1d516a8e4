"""`ClippedOptimizer`: wraps any Keras optimizer and clips its gradients or updates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import keras
from keras import backend

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _compat, aggregation
from keras_gradclip import _validation as validation
from keras_gradclip._layers import one_scan
from keras_gradclip._types import Config, Gradient, Scalar, Tensor
from keras_gradclip.clippers.base import Clipper, as_clipper, serialize
from keras_gradclip.names import path_of
from keras_gradclip.optimizer._accumulation import Accumulation, is_overwritten
from keras_gradclip.optimizer._advice import AUTO, choose
from keras_gradclip.optimizer._clip import Clip, ClipHyperparameters
from keras_gradclip.optimizer._inner import OF_INNER, SET_INNER, InnerUpdate, check_inner
from keras_gradclip.optimizer._loss_scale import DynamicLossScale, take_over
from keras_gradclip.optimizer._saving import arguments_of, load, set_all
from keras_gradclip.optimizer._skips import SpikeWindow
from keras_gradclip.optimizer._telemetry import Telemetry
from keras_gradclip.optimizer._watcher import ClippedUpdate, Watcher


@keras.saving.register_keras_serializable(package="keras_gradclip")
class ClippedOptimizer(keras.optimizers.Optimizer):
    """Wraps an optimizer so that it applies clipped gradients.

    The gradient is clipped after accumulation, the sum over all replicas, and unscaling. Works in
    any `keras.Model` and in custom loops. Settings are those of `inner_optimizer`.

    ```python
    optimizer = ClippedOptimizer(keras.optimizers.AdamW(1e-3), AbsoluteClip(0.1))
    model.compile(optimizer=optimizer, loss="mse")
    ```

    Args:
        inner_optimizer: a Keras optimizer, or its name. It must not clip or accumulate by
            itself.
        clipper: a clipper, anything that `keras_gradclip.get` accepts, None (clip nothing), or
            "auto": chosen for this optimizer and network once the variables are known; the
            logger "keras_gradclip" reports the choice and the reason.
        gradient_accumulation_steps: None, or the number of calls whose gradients are averaged
            into one update. The average is clipped. Learning-rate schedules count updates.
        skip_nonfinite: skip an update if its gradient has an infinity or a NaN on any replica,
            and count it in `skipped_steps`. Under mixed_float16 this always happens, and the
            loss scale falls.
        skip_spikes: σ, a number such as 6: skip an update, on every replica, whose global norm
            is not finite, or above mean + σ·std of the last 128 norms (once 64 are known), and
            count it in `skipped_steps`.
        telemetry: record the figures of `read_telemetry`: True at every update, which costs two
            or three more passes over the gradients; an int n at every n-th, from the first after
            a reset. `ClippedModel` turns it on with n = 8.
        name: the optimizer's name.
        compiled: "auto" runs the inner optimizer's update as one operation per variable, or by
            XLA, where possible and faster; True insists, and False leaves it to Keras. Results
            differ only by rounding. The property `compiled` reports what is done.

    Raises:
        ValueError: a wrong argument, an inner optimizer that clips, accumulates or scales by
            itself, or an unsupported strategy (CentralStorage, ParameterServer, TPU).
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer | str,
        clipper: Clipper | str | dict | None = None,
        gradient_accumulation_steps: int | None = None,
        skip_nonfinite: bool = False,
        telemetry: bool | int = False,
        name: str | None = None,
        *,
        compiled: bool | str = "auto",
        skip_spikes: float | None = None,
    ) -> None:
        owner = "ClippedOptimizer"
        inner_optimizer = check_inner(inner_optimizer, ClippedOptimizer)
        is_auto = isinstance(clipper, str) and clipper == AUTO
        given = as_clipper(owner, "clipper", None if is_auto else clipper, optional=True)
        steps = validation.steps(owner, "gradient_accumulation_steps", gradient_accumulation_steps)
        validation.choice(owner, "skip_nonfinite", skip_nonfinite, (True, False))
        validation.choice(owner, "compiled", compiled, ("auto", True, False))
        strategy = aggregation.current_strategy()
        aggregation.check_strategy(strategy)
        # A callable, for which Keras makes no variable; it is never called (see `learning_rate`).
        super().__init__(learning_rate=float, name=name)
        self.skip_nonfinite = skip_nonfinite
        self.gradient_accumulation_steps = steps
        self.strategy = strategy
        self._inner_update = InnerUpdate(inner_optimizer, strategy, compiled)
        self._is_scaled_elsewhere = False
        self._accumulation = Accumulation(steps) if steps and steps > 1 else None
        self._spikes = None if skip_spikes is None else SpikeWindow(skip_spikes)
        self.skip_spikes = self._spikes and self._spikes.sigmas
        self._telemetry = Telemetry(telemetry)
        self.watchers: tuple[Watcher, ...] = ()  # called at every update from the next trace on
        self.other_state: Callable[[], Sequence[keras.Variable]] = tuple  # on JAX, of a model
        self._is_auto = is_auto
        self._clip = Clip(given, inner_optimizer, self.add_variable)
        self.inner_optimizer = inner_optimizer  # last: see `__setattr__`

    # The state --------------------------------------------------------------------------------

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the state for `variables`, here and in the inner optimizer.

        Raises:
            ValueError: a ClipMap's rule matches none of the variables, or two rules collide.
        """
        if self.built:
            return
        variables = [*{id(v): v for v in variables}.values()]  # each once
        with aggregation.outside_of_traces(variables), one_scan():
            self._inner_update.build(variables)
            if self._is_auto:
                self.use(choose(self.inner_optimizer, variables, self.strategy))
            self._clip.resolve(variables)
            self._inner_update.limited = self._clip.limited
            steps = self.gradient_accumulation_steps
            self.gradient_accumulation_steps = None  # the base class would accumulate as well
            super().build(variables)
            self.gradient_accumulation_steps = steps
            self._clip.build()
            self._overwritten = [i for i, v in enumerate(variables) if is_overwritten(v)]
            self._skipped = self.add_variable((), "zeros", "int32", "none", name="skipped_steps")
            if self._accumulation is not None:
                self._accumulation.build(variables, self.add_variable, self._track_variable)
            if self._spikes is not None:
                self._spikes.build(self.add_variable)
            self._telemetry.build(variables)

    def use(self, clipper: Clipper | None) -> None:
        """Sets the clipper of an optimizer that is not built yet."""
        self._clip = Clip(clipper, self.inner_optimizer, self.add_variable)
        self._is_auto = False

    @property
    def variables(self) -> list[keras.Variable]:
        """All variables that a step may write: the wrapper's, inner optimizer's and watchers'."""
        own = [*self._variables, *self.inner_optimizer.variables]
        if self.built:
            own += self._telemetry.state
        if backend.backend() == "jax":
            own += [v for watcher in self.watchers for v in watcher.state]
            own += self.other_state()
        return own

    # One update -------------------------------------------------------------------------------

    @_compat.not_converted
    def apply(
        self,
        grads: Sequence[Gradient],
        trainable_variables: Sequence[keras.Variable] | None = None,
        scale: DynamicLossScale | None = None,
    ) -> None:
        """Clips and applies gradients; to be called in replica context.

        Args:
            grads: one gradient per variable; None and `tf.IndexedSlices` are allowed.
            trainable_variables: the variables; None for those that the optimizer was built with.
                The gradients of a variable that comes twice are added up, and clipped once.
            scale: the loss scale, if a `LossScaleOptimizer` calls.

        Raises:
            ValueError: unknown variables, no gradient at all, or cross-replica context.
        """
        grads = list(grads)
        if not grads:
            return
        gradients, named = self._collect(grads, trainable_variables)
        with aggregation.only_with(gradients):
            if self._accumulation is None:
                self._update(scale, named, gradients, {})
            else:
                self._accumulation.add(gradients)
                update, state = functools.partial(self._update, scale), self._written()
                aggregation.cond(
                    self._accumulation.is_due(self._iterations),
                    functools.partial(self._accumulation.apply, named, gradients, update, state),
                    state=state,
                )
            self._iterations.assign_add(1)

    def _collect(
        self, grads: Sequence[Gradient], trainable_variables: Sequence[keras.Variable] | None
    ) -> tuple[list[Gradient], list[int]]:
        """A gradient for each of the optimizer's variables, and the positions of the given ones."""
        if self.strategy is not None:
            aggregation.check_replica_context()
        if trainable_variables is None and not self.built:
            raise ValueError(
                "ClippedOptimizer: `apply(grads)` without variables needs a built optimizer. "
                "Call `optimizer.build(trainable_variables)` first."
            )
        own = self._trainable_variables
        variables = list(own if trainable_variables is None else trainable_variables)
        if not self.built:
            self.build(variables)
        if len(grads) != len(variables):
            raise ValueError(
                f"ClippedOptimizer: {len(grads)} gradients came for {len(variables)} variables."
            )
        if all(g is None for g in grads):
            raise ValueError("ClippedOptimizer: No gradients provided for any variable.")
        try:
            named = [self._get_variable_index(v) for v in variables]
        except KeyError:
            unknown = next(v for v in variables if not _compat.knows(self, v))
            raise ValueError(
                f"ClippedOptimizer: unknown variable {path_of(unknown)!r}. The optimizer works on "
                "the variables that it was built with; after unfreezing a layer, compile with a "
                "new optimizer."
            ) from None
        gradients: list[Gradient] = [None] * len(self._trainable_variables)
        for i, gradient in zip(named, grads, strict=True):
            if gradient is not None and gradients[i] is not None:  # a variable named twice
                gradient = arithmetic.dense(gradients[i]) + arithmetic.dense(gradient)
            gradients[i] = gradients[i] if gradient is None else gradient
        return gradients, [*dict.fromkeys(named)]

    def _written(self) -> list[keras.Variable]:
        """All variables that an update may write."""
        return [*self._trainable_variables, *self.variables]

    def _update(
        self,
        scale: DynamicLossScale | None,
        indices: Sequence[int],
        gradients: list[Gradient],
        if_present: dict[int, Tensor],
    ) -> None:
        """Sums over replicas, merges duplicate rows, unscales; then steps or skips.

        `indices` are positions of the variables to update, unless their flag `if_present` is false.
        """
        new_values: dict[int, Gradient] = {}  # instead of gradients
        if self._overwritten:
            largest = [gradients[i] for i in self._overwritten]
            largest = aggregation.all_reduce_max(largest, self.strategy)
            new_values = dict(zip(self._overwritten, largest, strict=True))
        gradients = [None if i in new_values else g for i, g in enumerate(gradients)]
        gradients = aggregation.all_reduce_sum(gradients, self.strategy)
        gradients = [arithmetic.merge_duplicate_rows(g) for g in gradients]
        micro_steps = self._accumulation.steps if self._accumulation else 1
        factor = scale.factor() if scale else self.inner_optimizer.loss_scale_factor or 1.0
        gradients = arithmetic.divided(gradients, micro_steps * factor)
        step = functools.partial(self._step, indices, scale)
        if not (self.skip_nonfinite or self._spikes or scale or self._is_scaled_elsewhere):
            step(gradients, new_values, if_present)
            return
        is_usable = self._spikes.add if self._spikes else arithmetic.all_finite
        aggregation.cond(
            is_usable(gradients),
            step,
            functools.partial(self._skip, scale),
            (gradients, new_values, if_present),
            state=self._written(),
        )

    def _step(
        self,
        indices: Sequence[int],
        scale: DynamicLossScale | None,
        gradients: list[Gradient],
        new_values: Mapping[int, Tensor],
        if_present: Mapping[int, Tensor],
    ) -> None:
        """Clips and rescales; applies the inner optimizer's update, limited by some clippers."""
        update = self._clip.clip(gradients)
        limit = None
        if self._clip.enforcer.on_updates and not self._inner_update.is_held:
            limit = functools.partial(self._clip.clip_changes, update, self._finish)
        else:
            self._finish(update)
        variables = self._trainable_variables
        self._inner_update(
            [new_values.get(i, update.clipped[i]) for i in indices],
            [variables[i] for i in indices],
            limit,
            {id(variables[i]): flag for i, flag in if_present.items()},
        )
        if scale:
            scale.on_finite()

    def _finish(self, update: ClippedUpdate) -> None:
        """Stores the clipper's state and calls the watchers, before weights change."""
        self._clip.keep(update.state)
        for watcher in (*self.watchers, self._telemetry):
            watcher.on_update(update)

    def _skip(
        self, scale: DynamicLossScale | None, gradients: list[Gradient], *_: Mapping[int, Tensor]
    ) -> None:
        """Skips an update whose gradient is not finite, or a spike; the same on every replica."""
        self._skipped.assign(self._skipped + 1)
        for watcher in (*self.watchers, self._telemetry):
            watcher.on_skip(gradients)
        if scale:
            scale.on_skip(arithmetic.all_finite(gradients))

    # Thresholds -------------------------------------------------------------------------------

    @property
    def clipper(self) -> Clipper | None:
        """The clipper with the present thresholds."""
        return self._clip.now

    @property
    def clip_hyperparameters(self) -> ClipHyperparameters:
        """The live thresholds, to read and to set: `["threshold"] = 0.05`."""
        return ClipHyperparameters(self._clip)

    # The inner optimizer ----------------------------------------------------------------------

    @property
    def learning_rate(self) -> Scalar:
        """The inner optimizer's learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Scalar) -> None:
        self.inner_optimizer.learning_rate = value
        self._clip.on_new_rate()

    def reset_clip_state(self) -> None:
        """Resets the clipper's running state: past norms, the largest learning rate."""
        self._clip.reset()

    @property
    def iterations(self) -> keras.Variable:
        """The number of updates so far; micro-batches and skipped steps do not count."""
        return self.inner_optimizer.iterations

    @property
    def compiled(self) -> str:
        """Whether the update is compiled: "yes", "no: reason", or "yes, except" what and why."""
        return str(self._inner_update.compiled)

    def finalize_variable_values(self, var_list: Sequence[keras.Variable]) -> None:
        """Finalises the weights as the inner optimizer does (moving averages)."""
        self._inner_update.finalize(var_list)

    @property
    def _model_variables_moving_average(self) -> list[keras.Variable]:
        """The moving averages, as `SwapEMAWeights` expects them under a loss scale."""
        return self.inner_optimizer._model_variables_moving_average

    def exclude_from_weight_decay(
        self,
        var_list: Sequence[keras.Variable] | None = None,
        var_names: Sequence[str] | None = None,
    ) -> None:
        """Excludes variables from the inner optimizer's weight decay."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def scale_loss(self, loss: Scalar) -> Scalar:
        """`loss` times the inner optimizer's fixed loss scale, if it has one."""
        return self.inner_optimizer.scale_loss(loss)

    def __setattr__(self, name: str, value: object) -> None:
        """Refuses the inner optimizer's settings; detects a `LossScaleOptimizer` around this."""
        is_made = "inner_optimizer" in self.__dict__
        is_new = is_made and not name.startswith("_") and not hasattr(self, name)
        if (is_new and hasattr(self.inner_optimizer, name)) or (is_made and name in OF_INNER):
            raise AttributeError(SET_INNER.format(name))
        if is_made and name == "loss_scale_factor":
            self._is_scaled_elsewhere = not take_over(self, value, ClippedOptimizer)
        else:
            super().__setattr__(name, value)

    # Figures ----------------------------------------------------------------------------------

    @property
    def skipped_steps(self) -> int:
        """The number of skipped updates, by a LossScaleOptimizer only on TensorFlow."""
        return int(aggregation.to_numpy(self._skipped)) if self.built else 0

    @property
    def first_nonfinite_variable(self) -> str | None:
        """Path of the first variable with a non-finite gradient, skipped or measured; or None."""
        return self._telemetry.first_nonfinite()

    @property
    def telemetry(self) -> bool | int:
        """Whether figures are recorded, or the interval in updates."""
        return self._telemetry.every

    @telemetry.setter
    def telemetry(self, value: bool | int) -> None:
        self._telemetry.set_interval(value)

    def mean_grad_norm(self) -> Scalar:
        """The mean global L2 norm before the clip since the last reset, a scalar; NaN at first."""
        return self._telemetry.mean_norm()

    def mean_clip_fraction(self) -> Scalar:
        """The mean of clipped / all elements (or norms) since the last reset; NaN at first."""
        return self._telemetry.mean_clip_fraction()

    def read_telemetry(self) -> Config:
        """The figures since the last `reset_telemetry`: see `Telemetry.read`."""
        return self._telemetry.read()

    def reset_telemetry(self) -> None:
        """Resets the averages of `read_telemetry`."""
        self._telemetry.reset()

    def watch(self, watcher: Watcher) -> None:
        """Adds a watcher, called at every update from the next trace on."""
        self.watchers = (*self.watchers, watcher)

    def unwatch(self, watcher: Watcher) -> None:
        """Removes a watcher."""
        self.watchers = tuple(w for w in self.watchers if w is not watcher)

    def held(self) -> AbstractContextManager[None]:
        """A context in which an update does everything except change the weights."""
        return self._inner_update.held()

    # Files ------------------------------------------------------------------------------------

    def _saved(self) -> dict[str, keras.Variable]:
        """The wrapper's own variables by their names in files, without telemetry's."""
        named = {"calls": self._iterations, **self._clip.saved()}
        if self.built:
            named["skipped"] = self._skipped
            for part in (self._spikes, self._accumulation):
                named |= {} if part is None else part.saved()
        return {name.replace("/", "|"): v for name, v in named.items()}

    def save_own_variables(self, store: dict[str, object]) -> None:
        """Saves the wrapper's variables; Keras saves the inner optimizer itself."""
        for name, variable in self._saved().items():
            store[name] = aggregation.to_numpy(variable)

    def load_own_variables(self, store: Mapping[str, Tensor]) -> None:
        """Loads the saved variables; those that do not match stay, with a warning."""
        load(self._saved(), store, self.built, self._is_auto)
        if self.built and self._accumulation is not None:
            self._accumulation.mark_from_sums()

    def set_weights(self, weights: Sequence[Tensor]) -> None:
        """Sets all variables, including the inner optimizer's, in the order of `variables`."""
        set_all(self.variables if self.built else None, weights)

    def __repr__(self) -> str:
        clipper = repr(AUTO) if self._is_auto else self.clipper
        return f"<{type(self).__name__} of {type(self.inner_optimizer).__name__}, {clipper}>"

    def get_config(self) -> Config:
        """The JSON-able arguments, with the present thresholds."""
        return {
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "clipper": AUTO if self._is_auto else serialize(self.clipper),
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "skip_nonfinite": self.skip_nonfinite,
            "skip_spikes": self.skip_spikes,
            "telemetry": self.telemetry,
            "name": self.name,
            "compiled": self._inner_update.compiled.mode,
            **({"paths": self._clip.paths} if self._clip.paths else {}),
        }

    @classmethod
    def from_config(cls, config: Config, custom_objects: Config | None = None) -> ClippedOptimizer:
        """The optimizer of a config, without its state."""
        optimizer = cls(**arguments_of(cls, config, custom_objects))
        optimizer._clip.paths = config.get("paths")
        return optimizer


def find(optimizer: keras.optimizers.Optimizer | None) -> ClippedOptimizer | None:
    """The ClippedOptimizer that `optimizer` is or wraps, or None."""
    while optimizer is not None and not isinstance(optimizer, ClippedOptimizer):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer


def find_all(optimizer: keras.optimizers.Optimizer | None) -> list[ClippedOptimizer]:
    """The ClippedOptimizers of an optimizer: one as in `find`, or those of a `MultiOptimizer`."""
    wrapper = find(optimizer)
    if wrapper is not None:
        return [wrapper]
    while inner := getattr(optimizer, "inner_optimizer", None):
        optimizer = inner
    return [found for part in getattr(optimizer, "optimizers", ()) for found in find_all(part)]
