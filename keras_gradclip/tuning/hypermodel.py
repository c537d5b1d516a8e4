"""A hypermodel that wraps the optimizer with the trial's clipper."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, cast

import keras
import keras_tuner as kt
import numpy as np

import keras_gradclip as kgc
from keras_gradclip import _compat
from keras_gradclip._types import Config
from keras_gradclip._validation import choice
from keras_gradclip.optimizer.clipped_optimizer import find
from keras_gradclip.tuning._kerastuner import infer_metric_direction
from keras_gradclip.tuning.divergence import DIVERGED, exploded, worst_score
from keras_gradclip.tuning.space import Value, clip_hyperparameters, to_clipper, to_gate

Build: TypeAlias = Callable[[kt.HyperParameters], keras.Model]


class ClipHyperModel(kt.HyperModel):
    """A hypermodel that wraps the optimizer with the trial's clipper.

    The given hypermodel declares its own hyper-parameters on `hp` and builds a compiled model
    without a clipper. This one adds the space of `clip_hyperparameters` and wraps the optimizer.
    The best model saves and loads with its clipper; a `ClippedModel` also with its activation gate.

    A trial diverges if a loss, a weight or the objective is not finite, or a weight grows beyond
    1e8. It stops at once and reports the worst possible value, so it ranks last.

    Args:
        build_model: a function `hp -> compiled keras.Model`, or a `keras_tuner.HyperModel`, such as
            those of `keras_tuner.applications`; its `fit` must pass its callbacks to `model.fit`.
        objective: the tuner's objective: a name such as "val_accuracy", or a
            `keras_tuner.Objective`.
        diverged_value: the objective of a trial that diverged; default -inf (to be maximised) or
            +inf. KerasTuner's own BayesianOptimization takes infinities for 0: give it a finite
            value, or use `keras_gradclip.tuning.make_oracle("bayesian", ...)`.
        **space: arguments of `clip_hyperparameters`. With `learning_rate`, the optimizer's
            learning rate is set from the trial.

    Raises:
        ValueError: not a hypermodel, several objectives, or a mistake in the space; when a trial is
            built, an uncompiled model, an optimizer that already clips, or a hyper-parameter of
            the hypermodel with a name of this space.
    """

    def __init__(
        self,
        build_model: Build | kt.HyperModel,
        objective: str | kt.Objective = "val_accuracy",
        diverged_value: float | None = None,
        **space: object,
    ) -> None:
        super().__init__()
        is_class_or_model = isinstance(build_model, (type, keras.Model))
        if isinstance(build_model, kt.HyperModel):
            self.hypermodel = build_model
        elif callable(build_model) and not is_class_or_model:
            self.hypermodel = _FromFunction(build_model)
        else:
            raise ValueError(
                "ClipHyperModel: `build_model` must be a function of hp that returns a compiled "
                f"model, or an instance of keras_tuner.HyperModel, but is {build_model!r}."
            )
        self.objective = as_objective(objective)
        worst = worst_score(self.objective.direction)
        self.diverged_value = worst if diverged_value is None else diverged_value
        self.space: Config = space
        declared = kt.HyperParameters()
        # Raises on a mistake in the space.
        clip_hyperparameters(declared, **space)  # type: ignore[arg-type]
        self._names = {parameter.name for parameter in declared.space}

    def declare_hyperparameters(self, hp: kt.HyperParameters) -> None:
        """Declares the hypermodel's own hyper-parameters."""
        self.hypermodel.declare_hyperparameters(hp)

    def build(self, hp: kt.HyperParameters) -> keras.Model:
        """The compiled model of a trial."""
        before = {parameter.name for parameter in hp.space}
        model = self.hypermodel.build(hp)
        theirs = {parameter.name for parameter in hp.space} - before
        for name in sorted(theirs & self._names):
            remedy = ", or leave `learning_rate=` out" if name == "learning_rate" else ""
            raise ValueError(
                f"ClipHyperModel: the hypermodel declares {name!r}, which this search declares "
                f"itself. Give it another name{remedy}."
            )
        values = clip_hyperparameters(hp, **self.space)
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None:
            raise ValueError(
                "ClipHyperModel: the hypermodel must build a compiled model, but it has no "
                "optimizer. Call model.compile(...) in `build`."
            )
        wrapped = _clipped(optimizer, to_clipper(values, self.space.get("groups")))
        if wrapped is not optimizer:
            _compat.replace_optimizer(model, wrapped)
        inner = cast(kgc.ClippedOptimizer, find(wrapped)).inner_optimizer
        if "learning_rate" in values:
            others = {n: value for n, value in hp.values.items() if n in theirs}
            _set_learning_rate(inner, values["learning_rate"], others)
        gate = to_gate(values, float(keras.ops.convert_to_numpy(inner.learning_rate)))
        if gate is not None:
            if isinstance(model, kgc.ClippedTrainStep):
                model._set_gate(gate)
            else:
                gate.attach(model)
        return model

    def fit(
        self,
        hp: kt.HyperParameters,
        model: keras.Model,
        *args: object,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        **kwargs: object,
    ) -> object:
        """Calls the hypermodel's `fit`, and stops it at divergence.

        Returns:
            Its result, a history with `grad_norm` and `clip_fraction`; for a diverged trial the
            worst value.
        """
        watch = _Watch()
        result = self.hypermodel.fit(hp, model, *args, callbacks=[watch, *callbacks], **kwargs)
        name = self.objective.name
        if watch.diverged or not _all_finite(result, name):
            return {name: self.diverged_value, DIVERGED: 1.0}
        return result


class _FromFunction(kt.HyperModel):
    """A hypermodel made of a build function; `fit` is `model.fit`."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.build = build


def _set_learning_rate(
    optimizer: keras.optimizers.Optimizer, value: Value, others: Mapping[str, Value]
) -> None:
    """Sets the learning rate; warns if one of the hypermodel's `others` may set it, too."""
    if not hasattr(optimizer.learning_rate, "assign"):
        raise ValueError(
            "ClipHyperModel: the optimizer's learning rate is a schedule, so that a trial cannot "
            "set `learning_rate`. Leave it out of the space, or build the schedule from hp."
        )
    before = np.float32(keras.ops.convert_to_numpy(optimizer.learning_rate))
    for name, other in others.items():
        if isinstance(other, float) and np.float32(other) == before:
            warnings.warn(
                f"ClipHyperModel: `learning_rate=` replaces the optimizer's learning rate, "
                f"{other:g}, and so is {name!r} of the hypermodel. If that sets it, leave one of "
                "the two out.",
                stacklevel=4,
            )
    optimizer.learning_rate = value


def _all_finite(result: object, name: str) -> bool:
    """True if the objective `name` is finite in the result of a `fit`."""
    if isinstance(result, (list, tuple)):
        return all(_all_finite(each, name) for each in result)
    if isinstance(result, keras.callbacks.History):
        return _all_finite(result.history.get(name, []), name)
    if isinstance(result, Mapping):
        return _all_finite(result.get(name), name)
    return result is None or math.isfinite(cast(float, result))


class _Watch(keras.callbacks.Callback):
    """Stops a non-finite run; adds the clip's figures to the logs of plain models."""

    def __init__(self) -> None:
        super().__init__()
        self.diverged = False

    def __deepcopy__(self, memo: dict) -> _Watch:
        return type(self)()

    def _stop(self) -> None:
        self.diverged = True
        self.model.stop_training = True

    def on_epoch_begin(self, epoch: int, logs: Config | None = None) -> None:
        optimizer = find(self.model.optimizer)
        if optimizer is None:
            raise ValueError(
                "ClipHyperModel: the model was compiled again after `build`, without the trial's "
                "clipper, by `optimizer=` of the tuner or in `fit`. Give the optimizer in `build`."
            )
        self._optimizer = optimizer
        self._optimizer.reset_telemetry()

    def on_train_batch_end(self, batch: int, logs: Config | None = None) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            self._stop()

    def on_epoch_end(self, epoch: int, logs: Config | None = None) -> None:
        means = self._optimizer.read_telemetry()
        if logs is not None:
            logs.update({name: float(means[name]) for name in ("grad_norm", "clip_fraction")})
        if exploded(self.model):
            self._stop()


def _clipped(
    optimizer: keras.optimizers.Optimizer, clipper: kgc.Clipper | None
) -> keras.optimizers.Optimizer:
    """`optimizer` with a clipper: the same object if it can clip, else a wrapper around it.

    The hypermodel's objects are used, because a copy by config would lose settings, such as the
    variables excluded from weight decay.
    """
    wrapper = find(optimizer)
    if wrapper is not None:
        if wrapper.get_config()["clipper"] is not None:
            raise ValueError(
                f"ClipHyperModel: the model has the clipper {wrapper.clipper or 'auto'} already. "
                "Compile it without one in `build`; the trial's clipper is put in."
            )
        if wrapper.built:
            raise ValueError(
                "ClipHyperModel: the ClippedOptimizer of the hypermodel is built already, without "
                "a clipper. Compile the model again at the end of `build`."
            )
        wrapper.use(clipper)
        wrapper.telemetry = True
        return optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return type(optimizer)(
            _clipped(optimizer.inner_optimizer, clipper),
            initial_scale=optimizer.initial_scale,
            dynamic_growth_steps=optimizer.dynamic_growth_steps,
            name=optimizer.name,
        )
    return kgc.ClippedOptimizer(optimizer, clipper, telemetry=True)


def as_objective(objective: object, direction: str | None = None) -> kt.Objective:
    """A `keras_tuner.Objective` from a name.

    Raises:
        ValueError: the direction is not known from the name and not given; several objectives.
    """
    if isinstance(objective, kt.Objective) and not hasattr(objective, "objectives"):
        return objective
    if not isinstance(objective, str):
        raise ValueError(
            "objective: must be a metric's name or a single keras_tuner.Objective, but is "
            f"{objective!r}."
        )
    if direction is None:
        direction = infer_metric_direction(objective)
    if direction is None:
        raise ValueError(
            f"objective: whether {objective!r} should be large or small is not known. Pass "
            "keras_tuner.Objective(name, direction), or --direction max or min."
        )
    return kt.Objective(objective, choice("objective", "direction", direction, ("max", "min")))
