"""What is tried: a recipe's runs, one or more a trial."""

import contextlib
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
from keras_gradclip.tuning.hypermodel import LARGEST_WEIGHT, exploded
from keras_gradclip.tuning.oracles import CONFIRMS, DIVERGED, worst_score
from keras_gradclip.tuning.space import to_clipper, to_gate
from recipes.errors import RecipeError, TrainingDiverged
from recipes.training import options as opts


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
        from recipes.training import run
        from recipes.training.callbacks import BACKUP, BEST, HISTORY, read_rows

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
