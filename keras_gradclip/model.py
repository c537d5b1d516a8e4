"""`ClippedTrainStep` and `ClippedModel`: Keras models that compile with a clipper."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeVar

import keras
from keras import backend

from keras_gradclip import _compat, aggregation, gate
from keras_gradclip._types import Config, Scalar, Strategy, Tensor
from keras_gradclip._undo import Undo
from keras_gradclip._workers import chief_writes
from keras_gradclip.clippers.base import Clipper
from keras_gradclip.optimizer._clip import ClipHyperparameters
from keras_gradclip.optimizer.clipped_optimizer import ClippedOptimizer, find

T = TypeVar("T")
#: An argument of `keras_gradclip.get`.
ClipperLike = Clipper | str | Config | None
#: Updates between two measurements; each costs as much as one or two clips.
MEASURED_EVERY = 8


class _TelemetryMetric(keras.metrics.Metric):
    """A view of a mean that the optimizer accumulates, without state of its own."""

    def __init__(self, name: str, mean: Callable[[], Scalar], reset: Callable[[], None]) -> None:
        super().__init__(name=name)
        self.result, self.reset_state = mean, reset

    def update_state(self, *args: object, **kwargs: object) -> None:
        """Nothing to do: the optimizer counts."""


class _Clipping:
    """The state that `compile` creates, in a plain object, which Keras does not track."""

    def __init__(self) -> None:
        self.metrics: list[_TelemetryMetric] = []
        self.hidden = False  # whether the metrics are hidden, as in an evaluation
        self.warned: set[str] = set()  # the names that a metric of the user has, too
        self.gate: gate.ActivationGate | None = None
        self.undo: Undo | None = None


class ClippedTrainStep(_compat.LocalSymbolicBuild):
    """Mixin for `keras.Model` subclasses: training with clipped gradients.

    ```python
    class MyNet(ClippedTrainStep, keras.Model): ...
    class MyStack(ClippedTrainStep, keras.Sequential): ...
    ```

    `compile` takes `clipper=`, `activation_gate=` and `skip_spikes=`, and wraps the optimizer in a
    `ClippedOptimizer`. `fit` logs `grad_norm` (global L2 norm before the clip) and
    `clip_fraction` (elements or norms clipped / all), both means over every 8th update of the
    epoch; over every update with `ClippedOptimizer(..., telemetry=True)`.
    `train_step` is Keras's own and may be overridden: gradients applied by `self.optimizer` are
    clipped, and the results of `compute_metrics` and `get_metrics_result` include the two figures.
    """

    def compile(
        self,
        optimizer: keras.optimizers.Optimizer | str = "rmsprop",
        *args: object,
        clipper: ClipperLike = None,
        activation_gate: gate.ActivationGate | Config | None = None,
        skip_spikes: float | None = None,
        **kwargs: object,
    ) -> None:
        """`keras.Model.compile` with three more arguments.

        Args:
            optimizer: as in Keras, or a `ClippedOptimizer`.
            *args: as in Keras.
            clipper: see `ClippedOptimizer`.
            activation_gate: an `ActivationGate`, or None.
            skip_spikes: see `ClippedOptimizer`.
            **kwargs: as in Keras.

        Raises:
            ValueError: an argument that `ClippedOptimizer` refuses, or `clipper` or `skip_spikes`
                together with a `ClippedOptimizer`.
        """
        new_gate = gate.as_gate(activation_gate)
        with self.distribute_scope():
            optimizer = _with_clipper(optimizer, clipper, skip_spikes)
            super().compile(optimizer, *args, **kwargs)  # type: ignore[misc]
        _compat.build_under(aggregation.outside_of_traces(), self)
        clipping, wrapper = _Clipping(), find(self.optimizer)
        object.__setattr__(self, "_clipping", clipping)
        if wrapper is not None:
            wrapper.telemetry = wrapper.telemetry or MEASURED_EVERY
            reset = wrapper.reset_telemetry
            clipping.metrics = [
                _TelemetryMetric("grad_norm", wrapper.mean_grad_norm, reset),
                _TelemetryMetric("clip_fraction", wrapper.mean_clip_fraction, reset),
            ]
            wrapper.other_state = tuple
            is_scaled = self.optimizer is not wrapper
            if is_scaled or wrapper.skip_nonfinite or wrapper.skip_spikes:
                undo = clipping.undo = Undo(self, wrapper)
                wrapper.other_state = lambda: undo.state
        self._set_gate(new_gate)

    _clipping = _Clipping()  # before `compile`
    optimizer: keras.optimizers.Optimizer

    def _set_gate(self, new_gate: gate.ActivationGate | None) -> None:
        self._clipping.gate = new_gate
        if new_gate is not None:
            gate.instrument(new_gate, self)

    @property
    def clip_hyperparameters(self) -> ClipHyperparameters:
        """The live thresholds: `ClippedOptimizer.clip_hyperparameters`, under any loss scale.

        Raises:
            ValueError: the model is not compiled.
        """
        wrapper = find(getattr(self, "optimizer", None))
        if wrapper is None:
            raise ValueError("clip_hyperparameters: compile the model with an optimizer first.")
        return wrapper.clip_hyperparameters

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if keras.Model in order and order.index(keras.Model) < order.index(ClippedTrainStep):
            raise TypeError(
                f"class {cls.__name__}: ClippedTrainStep must come before the Keras model among "
                "the bases: class MyNet(ClippedTrainStep, keras.Model)."
            )

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """Calls the model as Keras does, with its activation gate."""
        active = self._clipping.gate
        with gate.active(active) if active else contextlib.nullcontext():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def stateless_call(self, *args: object, **kwargs: object) -> tuple:
        """Calls the model as Keras does to train on JAX, with its activation gate."""
        active = self._clipping.gate
        with gate.active(active) if active else contextlib.nullcontext():
            return super().stateless_call(*args, **kwargs)  # type: ignore[misc]

    _distribute_strategy: Strategy | None = None  # set by Keras on TensorFlow

    def _local_batch(self, iterator: Iterable) -> Tensor:
        strategy = self._distribute_strategy
        if aggregation.spans_workers(strategy):
            local = strategy.experimental_local_results
            for _, _, batches in iterator:
                return keras.tree.map_structure(lambda v: local(v)[0], next(batches))
        return None

    def distribute_scope(self) -> contextlib.AbstractContextManager:
        """The scope of the strategy under which the model was created; else a null context."""
        strategy = self._distribute_strategy
        return contextlib.nullcontext() if strategy is None else strategy.scope()

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Keras's metrics; in training also `grad_norm` and `clip_fraction`.

        A figure is left out if another metric has its name.
        """
        own = super().metrics  # type: ignore[misc]
        return [*own, *self._figures({metric.name for metric in own})]

    def get_metrics_result(self) -> Config:
        """Keras's results with the two figures, unless another result has the name of a figure.

        All are NaN for an epoch whose updates were all skipped.
        """
        logs = self._without_figures(super().get_metrics_result)  # type: ignore[misc]
        undo = self._clipping.undo
        if undo is not None and not self._clipping.hidden:
            logs = undo.of_epoch(logs)
        return {**logs, **{figure.name: figure.result() for figure in self._figures(logs)}}

    def reset_metrics(self) -> None:
        """Resets Keras's metrics and the two figures, even one that is left out."""
        super().reset_metrics()  # type: ignore[misc]
        clipping = self._clipping
        if clipping.metrics and not clipping.hidden:
            clipping.metrics[0].reset_state()
        if clipping.undo is not None:
            clipping.undo.on_reset_metrics()

    def _figures(self, names: Collection[str]) -> list[_TelemetryMetric]:
        """The visible figures without those whose name is among `names`."""
        clipping = self._clipping
        if clipping.hidden:
            return []
        for taken in {m.name for m in clipping.metrics}.intersection(names) - clipping.warned:
            clipping.warned.add(taken)
            warnings.warn(
                f"ClippedModel: a metric of yours is called {taken!r}, so the clip's figure of "
                "that name is not logged. Rename yours, or call `optimizer.read_telemetry()`.",
                stacklevel=4,
            )
        return [metric for metric in clipping.metrics if metric.name not in names]

    def fit(self, *args: object, **kwargs: object) -> keras.callbacks.History:
        """Trains as in Keras; under MultiWorkerMirroredStrategy, only the chief writes files.

        There all workers call `fit` with the same arguments. The batch size is global, and each
        worker takes its part of every batch. Shuffled arrays need the same seed on every worker
        (`keras.utils.set_random_seed`).
        """
        wrapper = find(getattr(self, "optimizer", None))
        watchers = wrapper.watchers if wrapper is not None else ()
        strategy = self._distribute_strategy
        try:
            if not aggregation.spans_workers(strategy):
                return super().fit(*args, **kwargs)  # type: ignore[misc]
            given = inspect.signature(super().fit).bind(*args, **kwargs)  # type: ignore[misc]
            with chief_writes(strategy, given.arguments.get("callbacks")) as callbacks:
                given.arguments["callbacks"] = callbacks
                return super().fit(*given.args, **given.kwargs)  # type: ignore[misc]
        except BaseException:
            if wrapper is not None and wrapper.watchers != watchers:  # left by callbacks
                wrapper.watchers, self.train_function = watchers, None
            raise

    def evaluate(self, *args: object, **kwargs: object) -> Config | list[float]:
        """Evaluates as in Keras, without the two figures."""
        return self._without_figures(super().evaluate, *args, **kwargs)  # type: ignore[misc]

    def test_on_batch(self, *args: object, **kwargs: object) -> Config | list[float]:
        """Evaluates a batch as in Keras, without the two figures."""
        return self._without_figures(super().test_on_batch, *args, **kwargs)  # type: ignore[misc]

    def _without_figures(self, fn: Callable[..., T], *args: object, **kwargs: object) -> T:
        clipping = self._clipping
        before, clipping.hidden = clipping.hidden, True
        try:
            return fn(*args, **kwargs)
        finally:
            clipping.hidden = before

    def make_train_function(self, force: bool = False) -> None:
        """Makes Keras's function; `steps_per_execution` also works on several replicas."""
        clipping, undo = self._clipping, self._clipping.undo
        if clipping.gate is not None:
            gate.instrument(clipping.gate, self)  # layers may have been created since compile
        if clipping.metrics and backend.backend() == "jax":
            self._make_stateless(force)
        elif undo is None:
            self._make_step_function("train", force)
        elif backend.backend() == "torch":  # its function looks up the train step at each call
            before = self.train_function
            self._make_step_function("train", force)
            if self.train_function is not before:
                self.train_function = undo.around(self.train_function)
        else:
            with self._with_train_step(undo.around(self.train_step)):
                self._make_step_function("train", force)

    def make_test_function(self, force: bool = False) -> None:
        """Makes Keras's function; `steps_per_execution` also works on several replicas."""
        self._make_step_function("test", force)

    train_step: Callable[..., Tensor]

    @contextlib.contextmanager
    def _with_train_step(self, step: Callable[..., Tensor]) -> Iterator[None]:
        """A context that replaces `self.train_step`, which Keras compiles."""
        own = self.__dict__.get("train_step")
        object.__setattr__(self, "train_step", step)
        try:
            yield
        finally:
            object.__delattr__(self, "train_step")
            if own is not None:
                object.__setattr__(self, "train_step", own)

    def _make_stateless(self, force: bool) -> None:
        """Makes Keras's train function on JAX, where a step takes and returns all state.

        The figures are computed from the returned state, as variables have no values meanwhile.
        """
        train_step, undo = self.train_step, self._clipping.undo
        if undo is not None:
            undo.build()

        def step(state: Tensor, data: Tensor) -> Tensor:
            before = state
            logs, state = self._without_figures(train_step, state, data)
            if undo is not None:
                state = undo.of_state(before, state)
                mapping = zip(self.metrics_variables, state[3], strict=True)
                with keras.StatelessScope(state_mapping=mapping):
                    logs = self._without_figures(undo.counted, logs)
            if isinstance(logs, dict):
                mapping = zip(self.optimizer.variables, state[2], strict=True)
                with keras.StatelessScope(state_mapping=mapping):
                    logs = {**logs, **{m.name: m.result() for m in self._figures(logs)}}
            return logs, state

        with self._with_train_step(step):
            super().make_train_function(force)  # type: ignore[misc]

    steps_per_execution: int
    metrics_variables: list[keras.Variable]

    def _make_step_function(self, kind: str, force: bool) -> None:
        """Makes the train or test function; see `aggregation.make_step_function`."""
        attribute, strategy = f"{kind}_function", self._distribute_strategy
        replicas = 1 if strategy is None else strategy.num_replicas_in_sync
        is_loop = replicas > 1 and self.steps_per_execution > 1
        if not (is_loop or aggregation.spans_workers(strategy)):
            getattr(super(), f"make_{kind}_function")(force)
        elif force or getattr(self, attribute) is None:
            step = getattr(self, f"{kind}_step")
            setattr(self, attribute, aggregation.make_step_function(self, step))

    def get_compile_config(self) -> Config:
        """The JSON-able argument of `compile_from_config`."""
        config = super().get_compile_config()  # type: ignore[misc]
        if config:
            config["activation_gate"] = keras.saving.serialize_keras_object(self._clipping.gate)
        return config

    def compile_from_config(self, config: Config) -> None:
        """Compiles from the result of `get_compile_config`, and builds the optimizer."""
        if type(self).compile is not ClippedTrainStep.compile:
            super().compile_from_config(config)  # type: ignore[misc]  # warns, as in Keras
            return
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:  # type: ignore[attr-defined]
            with self.distribute_scope():
                self.optimizer.build(self.trainable_variables)  # type: ignore[attr-defined]


@keras.saving.register_keras_serializable(package="keras_gradclip")
class ClippedModel(ClippedTrainStep, keras.Model):
    """A `keras.Model` with the arguments and logs of `ClippedTrainStep`.

    Subclass it, or build it from the inputs and outputs of a functional graph:

    ```python
    body = keras.applications.ResNet50(weights=None, classes=10, input_shape=(32, 32, 3))
    model = ClippedModel(body.inputs, body.outputs)
    model.compile("adamw", "sparse_categorical_crossentropy", clipper=AbsoluteClip(0.1))
    ```
    """

    def __new__(cls, *args: object, **kwargs: object) -> ClippedModel:
        """Creates a `ClippedModel`, a functional one from inputs and outputs."""
        if cls is ClippedModel and _compat.functional_init_arguments(args, kwargs):
            return super().__new__(ClippedFunctional, *args, **kwargs)
        if cls is ClippedModel and args and isinstance(args[0], keras.Model):
            raise ValueError(
                f"ClippedModel: {args[0]!r} is a model. Write ClippedModel(model.inputs, "
                "model.outputs)."
            )
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, *args: object, **kwargs: object) -> None:
        if _compat.functional_init_arguments(args, kwargs):
            # Keras would make `ClippedModel` itself functional, and all its subclasses.
            _make_functional(type(self))
        super().__init__(*args, **kwargs)


@keras.saving.register_keras_serializable(package="keras_gradclip")
class ClippedFunctional(ClippedModel, _compat.Functional):
    """The class of `ClippedModel(inputs, outputs)`."""

    # Keras 3.12 saves a functional model only with this signature.
    def __init__(self, *args: object, **kwargs: object) -> None:
        _compat.Functional.__init__(self, *args, **kwargs)


def _make_functional(cls: type) -> None:
    """Replaces `ClippedModel` by `ClippedFunctional` among the bases of a user's subclass."""
    if issubclass(cls, _compat.Functional):
        return
    for base in cls.__bases__:
        if issubclass(base, ClippedModel) and base is not ClippedModel:
            _make_functional(base)
    cls.__bases__ = tuple(
        ClippedFunctional if base is ClippedModel else base for base in cls.__bases__
    )


def _with_clipper(
    optimizer: keras.optimizers.Optimizer, clipper: ClipperLike, skip_spikes: float | None
) -> keras.optimizers.Optimizer:
    """`optimizer`, wrapped in a `ClippedOptimizer` unless it is one."""
    if optimizer is None:
        if clipper is not None:
            raise ValueError(f"compile: `clipper` ({clipper!r}) needs an optimizer, not None.")
        return None
    if isinstance(optimizer, (str, dict)):
        optimizer = keras.optimizers.get(optimizer)
    if find(optimizer) is None:
        return ClippedOptimizer(optimizer, clipper, skip_spikes=skip_spikes)
    for name, value in (("clipper", clipper), ("skip_spikes", skip_spikes)):
        if value is not None:
            raise ValueError(
                f"compile: `{name}` ({value!r}) was given beside a ClippedOptimizer. Give it in "
                f"one place: ClippedOptimizer(..., {name}=...)."
            )
    return optimizer
