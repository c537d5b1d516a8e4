"""What is tried: a user's `build_model(hp)` in a `ClipHyperModel`, or a recipe by `RecipeTuner`."""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import keras
import keras_tuner as kt
import numpy as np
from keras_tuner.engine.base_tuner import BaseTuner

import keras_gradclip as kgc
from recipes import options as opts
from recipes.errors import RecipeError, TrainingDiverged
from tuning.oracles import CONFIRMS, DIVERGED, worst_score
from tuning.space import clip_hyperparameters, to_clipper, to_gate

LARGEST_WEIGHT = 1e8

# ---------------------------------------------------------------------------- a user's own model


class ClipHyperModel(kt.HyperModel):
    """A `build_model(hp)` whose optimizer clips as the trial says.

    `build_model` declares what it likes on `hp` and returns a compiled model without a clipper.
    The space of `clip_hyperparameters` is added, and the optimizer wrapped.

    A trial that diverges (a loss, a weight or the objective that is not finite, or a weight beyond
    1e8) stops at once and reports the worst possible value: it ranks last, and the search goes on.

    Args:
        build_model: `hp -> compiled keras.Model`.
        objective: what the tuner optimises: a name such as "val_accuracy", or a
            `keras_tuner.Objective`.
        diverged_value: the objective of a trial that diverged; default -inf (to be maximised) or
            +inf. KerasTuner's own BayesianOptimization takes infinities for 0: give it a finite
            value, or use `tuning.oracles.make_oracle("bayesian", ...)`.
        **space: arguments of `clip_hyperparameters`. With `learning_rate`, the optimizer's
            learning rate is set from the trial.

    Raises:
        ValueError: several objectives, or (when a trial is built) a model that is not compiled,
            or whose optimizer clips already.
    """

    def __init__(
        self,
        build_model: Callable,
        objective="val_accuracy",
        diverged_value: float | None = None,
        **space,
    ):
        super().__init__()
        self.build_model = build_model
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
        inner = _without_clipping(optimizer)
        if "learning_rate" in values:
            if not hasattr(inner.learning_rate, "assign"):
                raise ValueError(
                    "ClipHyperModel: the optimizer's learning rate is a schedule, so that "
                    "`learning_rate` cannot be set from the trial. Leave it out of the space, or "
                    "build the schedule from hp in `build_model`."
                )
            inner.learning_rate = values["learning_rate"]
        clipper = to_clipper(values, self.space.get("groups"))
        wrapped = kgc.ClippedOptimizer(inner, clipper, telemetry=True)
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            wrapped = keras.optimizers.LossScaleOptimizer(wrapped)
        model.optimizer = wrapped
        gate = to_gate(values, float(keras.ops.convert_to_numpy(inner.learning_rate)))
        if gate is not None:
            gate.attach(model)
        return model

    def fit(self, hp, model, *args, callbacks=(), **kwargs):
        """`model.fit`, which stops at divergence.

        Returns:
            The history with `grad_norm` and `clip_fraction`; the worst value for a trial that
            diverged.
        """
        watch = _Watch()
        history = model.fit(*args, callbacks=[watch, *callbacks], **kwargs)
        name = self.objective.name
        seen = history.history.get(name, [])
        if watch.diverged or not all(math.isfinite(value) for value in seen):
            return {name: self.diverged_value, DIVERGED: 1.0}
        return history


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
        self._optimizer = _find(self.model.optimizer)
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


def exploded(model) -> bool:
    """Whether a trainable weight is not finite, or so large that no training led there.

    One step at a learning rate of 1e38 may leave weights of 1e37: finite, and with luck accurate.
    """
    weights = (keras.ops.convert_to_numpy(v) for v in model.trainable_variables)
    # Not "any > LARGEST": NaN is not larger than anything.
    return not all((np.abs(weight) <= LARGEST_WEIGHT).all() for weight in weights)


def _find(optimizer):
    while not isinstance(optimizer, kgc.ClippedOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer


def _without_clipping(optimizer):
    """The inner optimizer, a fresh copy, if nothing clips yet."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    if isinstance(optimizer, kgc.ClippedOptimizer):
        if optimizer.clipper is not None:
            raise ValueError(
                f"ClipHyperModel: the model has the clipper {optimizer.clipper} already. Compile "
                "it without one in `build_model`; the trial's clipper is put in."
            )
        optimizer = optimizer.inner_optimizer
    # Its own copy: the wrapper of a ClippedModel has claimed this one.
    return type(optimizer).from_config(optimizer.get_config())


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
        from keras_tuner.engine.metrics_tracking import infer_metric_direction

        direction = infer_metric_direction(objective)
    if direction is None:
        raise ValueError(
            f"objective: whether {objective!r} should be large or small is not known; say "
            "--direction max or min, or keras_tuner.Objective(name, direction)."
        )
    return kt.Objective(objective, direction)


# ------------------------------------------------------------------------------------- a recipe


class RecipeTuner(BaseTuner):
    """Runs trials of a recipe through `recipes.training.run`.

    Each run lives in a folder of its trial and goes on there after a kill, from its last backup.
    Hyperband's later rounds go on from a copy of the round before, optimizer state included.

    Args:
        recipe: `recipes.training.Recipe`.
        given: the options that the user fixed, by name.
        space: arguments of `clip_hyperparameters`.
        objective: `keras_tuner.Objective`, over the columns of a run's `history.csv`.
        executions: runs of each trial, with seeds in a row; their mean counts.
        confirm_executions: runs of a trial that confirms another, with seeds of its own.
        keep_weights: leave each run's `best.keras` in place.
        keep_backups: leave each run's backup in place, for Hyperband to go on from.
        report: called with a line of text at the end of each epoch.
        oracle, **kwargs: as of KerasTuner's tuners.
    """

    def __init__(
        self,
        recipe,
        given: Mapping,
        space: Mapping,
        objective,
        oracle,
        executions: int = 1,
        confirm_executions: int = 3,
        keep_weights: bool = False,
        keep_backups: bool = False,
        report: Callable = print,
        **kwargs,
    ):
        self.recipe, self.given, self.space = recipe, dict(given), dict(space)
        self.objective, self.report = objective, report
        self.executions, self.confirm_executions = executions, confirm_executions
        self.keep_weights, self.keep_backups = keep_weights, keep_backups
        self._asked = False
        folder = Path(kwargs["directory"]) / kwargs["project_name"]
        if (folder / "oracle.json").exists():
            # KerasTuner reloads where it finds its tuner's file, which has nothing in it and
            # which it first writes at the end of a trial.
            name = os.environ.get("KERASTUNER_TUNER_ID", "tuner0")
            (folder / f"{name}.json").write_text("{}")
        super().__init__(oracle, hypermodel=None, **kwargs)

    def options(self, values: Mapping, execution: int = 0):
        """The recipe's options of a trial.

        Args:
            values: of the trial's hyper-parameters.
            execution: int, which of the trial's runs; moves the seed.

        Raises:
            RecipeError: options that do not go together.
        """
        settings = trial_settings(self.given, self.space, values)
        settings["seed"] = self.recipe.options(**settings).seed + execution
        return self.recipe.options(**settings)

    def pre_create_trial(self):
        """KerasTuner asks again at once where there is nothing to do yet."""
        if self._asked:
            time.sleep(1)
        self._asked = True

    def run_trial(self, trial, *args, **kwargs):
        """Trains the trial's runs, and reports the mean of their metrics."""
        self._asked = False
        values = trial.hyperparameters.values
        numbers = range(self.executions)
        if CONFIRMS in values:
            numbers = range(self.executions, self.executions + self.confirm_executions)
        folder = Path(self.get_trial_dir(trial.trial_id))
        results = [self._execute(values, folder / f"run-{i}", i) for i in numbers]
        scores = [result[self.objective.name] for result in results]
        means = {
            name: float(np.mean([result[name] for result in results]))
            for name in results[0]
            if all(name in result for result in results)
        }
        if any(result[DIVERGED] for result in results):
            means |= {self.objective.name: worst_score(self.objective.direction), DIVERGED: 1.0}
        else:
            means |= {"lowest": min(scores), "highest": max(scores)}
        return {**means, "runs": float(len(numbers))}

    def _execute(self, values, folder, execution) -> dict:
        options = self.options(values, execution)
        last = int(values.get("tuner/epochs", options.epochs))
        try:
            parent = values.get("tuner/trial_id")
            if parent and not (folder / "config.json").exists():
                _copy(Path(self.get_trial_dir(parent)) / folder.name, folder)
            return self._train(options, folder, last)
        except (RecipeError, OSError) as error:
            # The same in every trial: a full disk, a data set that is not there ...
            raise kt.errors.FatalError(str(error)) from error

    def _train(self, options, folder, last) -> dict:
        from recipes.callbacks import BACKUP, BEST, HISTORY, read_rows
        from recipes.training import run

        note = folder / "diverged.json"
        started = time.monotonic()
        rows = read_rows(folder / HISTORY)
        if not note.exists() and len(rows) < last:
            options.resume = (folder / "config.json").exists()
            callbacks = [_Epochs(last, self.objective.name, self.report)]
            try:
                run(self.recipe, options, folder, callbacks)
            except TrainingDiverged as error:
                opts.write_json(note, {"message": str(error)})
            rows = read_rows(folder / HISTORY)
        if not self.keep_weights:
            (folder / BEST).unlink(missing_ok=True)
        if not self.keep_backups:
            (folder / BACKUP).unlink(missing_ok=True)
        return self._metrics(rows[:last], note.exists(), time.monotonic() - started)

    def _metrics(self, rows, diverged, seconds) -> dict:
        name, direction = self.objective.name, self.objective.direction
        finite = [row for row in rows if math.isfinite(row[name])]
        if diverged or len(finite) < len(rows) or not rows:
            return {name: worst_score(direction), DIVERGED: 1.0, "seconds": seconds}
        best = (max if direction == "max" else min)(rows, key=lambda row: row[name])
        numbers = {key: value for key, value in best.items() if isinstance(value, float)}
        for key in ("clip_fraction", "grad_norm"):
            if key in best:
                numbers[key] = float(np.mean([row[key] for row in rows]))
        return {**numbers, DIVERGED: 0.0, "epochs": float(len(rows)), "seconds": seconds}


def trial_settings(given: Mapping, space: Mapping, values: Mapping) -> dict:
    """The options of a recipe that a trial sets, over those that the user fixed.

    Args:
        given: the user's options by name.
        space: arguments of `clip_hyperparameters`.
        values: the trial's hyper-parameters.

    Returns:
        A dict for `recipe.options(**settings)`.
    """
    settings = dict(given)
    if "learning_rate" in values:
        settings["learning_rate"] = float(f"{values['learning_rate']:.7g}")
    clipper = to_clipper(values, space.get("groups"))
    if clipper is None:
        settings["clipper"] = "none"
    else:
        settings["clip_config"] = kgc.serialize(clipper)
    gate = to_gate(values, 1.0)  # the recipe puts in its own learning rate
    if gate is not None:
        settings["activation_gate"] = True
        settings |= {"gate_clip_value": gate.clip_value, "gate_gamma": gate.gamma}
    return settings


class _Epochs(keras.callbacks.Callback):
    """Reports each epoch, and ends the run after `last` of them (in the middle of its schedule)."""

    def __init__(self, last, metric, report):
        super().__init__()
        self.last, self.metric, self.report = last, metric, report

    def on_epoch_end(self, epoch, logs=None):
        logs = logs or {}
        if self.metric not in logs:
            raise RecipeError(f"--objective {self.metric}: not among {', '.join(sorted(logs))}")
        self.report(f"  epoch {epoch + 1}/{self.last}  {self.metric} {logs[self.metric]:.4f}")
        if exploded(self.model):
            raise TrainingDiverged(f"a weight grew beyond {LARGEST_WEIGHT:g}", step=-1)
        if epoch + 1 >= self.last:
            self.model.stop_training = True


def _copy(source: Path, target: Path) -> None:
    """Copies a run whole or not at all."""
    if not source.exists():
        raise RecipeError(
            f"{source} is not there: Hyperband goes on from the folder of an earlier trial. Let "
            "all workers share --output"
        )
    scratch = target.with_name(f".partial-{target.name}")
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(scratch)
    shutil.copytree(source, scratch)
    if target.exists():
        shutil.rmtree(target)
    os.replace(scratch, target)


def read_message(folder: Path) -> str:
    """Why a run diverged, if its folder can be read from here."""
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return json.loads((folder / "diverged.json").read_text())["message"]
    return ""
