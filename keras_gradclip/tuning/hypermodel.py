"""What is tried: a user's `build_model(hp)` in a `ClipHyperModel`."""

import math
from collections.abc import Callable, Mapping
from typing import cast

import keras
import keras_tuner as kt

import keras_gradclip as kgc
from keras_gradclip import _compat
from keras_gradclip.optimizer.clipped_optimizer import find
from keras_gradclip.tuning._kerastuner import infer_metric_direction
from keras_gradclip.tuning.divergence import DIVERGED, exploded, worst_score
from keras_gradclip.tuning.space import clip_hyperparameters, to_clipper, to_gate


class ClipHyperModel(kt.HyperModel):
    """A `build_model(hp)` whose optimizer clips as the trial says.

    `build_model` declares what it likes on `hp` and returns a compiled model without a clipper.
    The space of `clip_hyperparameters` is added, and the optimizer wrapped. The best model saves
    and loads with its clipper; with its activation gate, too, where it is a `ClippedModel`.

    A trial that diverges (a loss, a weight or the objective that is not finite, or a weight beyond
    1e8) stops at once and reports the worst possible value: it ranks last, and the search goes on.

    Args:
        build_model: `hp -> compiled keras.Model`, or a `keras_tuner.HyperModel`, whose `build` and
            `fit` are used; its `fit` must hand the callbacks that it gets on to `model.fit`.
        objective: what the tuner optimises: a name such as "val_accuracy", or a
            `keras_tuner.Objective`.
        diverged_value: the objective of a trial that diverged; default -inf (to be maximised) or
            +inf. KerasTuner's own BayesianOptimization takes infinities for 0: give it a finite
            value, or use `keras_gradclip.tuning.make_oracle("bayesian", ...)`.
        **space: arguments of `clip_hyperparameters`. With `learning_rate`, the optimizer's
            learning rate is set from the trial.

    Raises:
        ValueError: several objectives, or (when a trial is built) a model that is not compiled,
            or whose optimizer clips already.
    """

    def __init__(
        self,
        build_model: Callable | kt.HyperModel,
        objective="val_accuracy",
        diverged_value: float | None = None,
        **space,
    ):
        super().__init__()
        self.hypermodel = build_model if isinstance(build_model, kt.HyperModel) else None
        self.build_model = build_model if self.hypermodel is None else self.hypermodel.build
        self.objective = as_objective(objective)
        if diverged_value is None:
            diverged_value = worst_score(self.objective.direction)
        self.diverged_value = diverged_value
        self.space = space

    def build(self, hp):
        """The compiled model of a trial."""
        model = self.build_model(hp)
        values = clip_hyperparameters(hp, **self.space)
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None:
            raise ValueError(
                "ClipHyperModel: `build_model` must return a compiled model, but it has no "
                "optimizer. Call model.compile(...) in it."
            )
        wrapped = _clipped(optimizer, to_clipper(values, self.space.get("groups")))
        if wrapped is not optimizer:
            _compat.replace_optimizer(model, wrapped)
        inner = cast(kgc.ClippedOptimizer, find(wrapped)).inner_optimizer
        if "learning_rate" in values:
            if not hasattr(inner.learning_rate, "assign"):
                raise ValueError(
                    "ClipHyperModel: the optimizer's learning rate is a schedule, so that "
                    "`learning_rate` cannot be set from the trial. Leave it out of the space, or "
                    "build the schedule from hp in `build_model`."
                )
            inner.learning_rate = values["learning_rate"]
        gate = to_gate(values, float(keras.ops.convert_to_numpy(inner.learning_rate)))
        if gate is not None:
            if isinstance(model, kgc.ClippedTrainStep):
                model._set_gate(gate)
            else:
                gate.attach(model)
        return model

    def fit(self, hp, model, *args, callbacks=(), **kwargs):
        """`model.fit`, or that of the `keras_tuner.HyperModel`, which stops at divergence.

        Returns:
            What that returns, a history with `grad_norm` and `clip_fraction`; the worst value for a
            trial that diverged.
        """
        watch = _Watch()
        if self.hypermodel is not None:
            args = (hp, model, *args)
        fit = model.fit if self.hypermodel is None else self.hypermodel.fit
        result = fit(*args, callbacks=[watch, *callbacks], **kwargs)
        name = self.objective.name
        if watch.diverged or not _all_finite(result, name):
            return {name: self.diverged_value, DIVERGED: 1.0}
        return result


def _all_finite(result, name: str) -> bool:
    """Whether the objective `name` is finite in what a `fit` may return to KerasTuner."""
    if isinstance(result, (list, tuple)):
        return all(_all_finite(each, name) for each in result)
    if isinstance(result, keras.callbacks.History):
        return _all_finite(result.history.get(name, []), name)
    if isinstance(result, Mapping):
        return _all_finite(result.get(name), name)
    return result is None or math.isfinite(result)


class _Watch(keras.callbacks.Callback):
    """Stops a run that is not finite; adds the clip's figures to the logs of plain models."""

    def __init__(self):
        super().__init__()
        self.diverged = False

    def __deepcopy__(self, memo):
        return type(self)()

    def _stop(self):
        self.diverged = True
        self.model.stop_training = True

    def on_epoch_begin(self, epoch, logs=None):
        self._optimizer = cast(kgc.ClippedOptimizer, find(self.model.optimizer))
        self._optimizer.reset_telemetry()

    def on_train_batch_end(self, batch, logs=None):
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            self._stop()

    def on_epoch_end(self, epoch, logs=None):
        seen = self._optimizer.read_telemetry()
        for name in ("grad_norm", "clip_fraction"):
            logs[name] = float(seen[name])
        if exploded(self.model):
            self._stop()


def _clipped(optimizer, clipper):
    """`optimizer` with a clipper: itself where it can clip, else a wrapper around it.

    Everything else that `build_model` chose stays: the objects are used, not copies of their
    configs, which lack what a config does not hold (variables excluded from weight decay).
    """
    wrapper = find(optimizer)
    if wrapper is not None:
        if wrapper.get_config()["clipper"] is not None:
            raise ValueError(
                f"ClipHyperModel: the model has the clipper {wrapper.clipper or 'auto'} already. "
                "Compile it without one in `build_model`; the trial's clipper is put in."
            )
        if wrapper.built:
            raise ValueError(
                "ClipHyperModel: the ClippedOptimizer of `build_model` is built already, without "
                "a clipper. Compile the model again at the end of `build_model`."
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


def as_objective(objective, direction: str | None = None) -> kt.Objective:
    """A `keras_tuner.Objective` from a name.

    Raises:
        ValueError: the direction is not known from the name and not given; several objectives.
    """
    if isinstance(objective, kt.Objective):
        if not hasattr(objective, "direction") or hasattr(objective, "objectives"):
            raise ValueError("objective: one objective was expected, but several came.")
        return objective
    if not isinstance(objective, str):
        raise ValueError(
            f"objective: a metric's name or keras_tuner.Objective was expected, not {objective!r}."
        )
    if direction is None:
        direction = infer_metric_direction(objective)
    if direction is None:
        raise ValueError(
            f"objective: whether {objective!r} should be large or small is not known; say "
            "--direction max or min, or keras_tuner.Objective(name, direction)."
        )
    return kt.Objective(objective, direction)
