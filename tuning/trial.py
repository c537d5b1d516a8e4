"""The tuner of recipes: a trial is a number of runs that differ only in their seeds."""

import math
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import keras_tuner as kt

import keras_gradclip as kgc
from keras_gradclip.files import write_json
from keras_gradclip.tuning.divergence import DIVERGED, LARGEST_WEIGHT, exploded, worst_score
from keras_gradclip.tuning.oracles import CONFIRMS, SearchOracle, SearchTuner
from keras_gradclip.tuning.space import to_clipper, to_gate
from recipes.errors import RecipeError, TrainingDiverged
from recipes.training import Recipe, run
from recipes.training.folder import BACKUP, BEST, CONFIG, HISTORY, read_history

#: The folder of the trials inside that of a search.
PROJECT = "trials"
CHANCE = "chance"  # a metric: the accuracy of random guessing


class RecipeTuner(SearchTuner):
    """Trains the runs of each trial in folders of their own; resumes a run that was killed.

    Hyperband's later rounds resume a copy of the previous round, with its optimizer state.

    Args:
        given: the options that the user fixed, by name.
        space: arguments of `clip_hyperparameters`.
        objective: its name is a column of a run's `history.csv`.
        args: the search's own flags.
        report: called with a line of text at the end of each epoch.
        oracle: `SearchOracle`, or KerasTuner's client of the chief's.
    """

    def __init__(
        self,
        recipe: Recipe,
        given: Mapping[str, Any],
        space: Mapping[str, Any],
        objective: Any,
        args: Namespace,
        report: Callable[[str], object],
        oracle: SearchOracle,
        folder: Path,
    ):
        self.recipe, self.given, self.space, self.objective = recipe, given, space, objective
        self.args, self.report = args, report
        super().__init__(oracle, folder, PROJECT)

    def run_trial(self, trial, *args, **kwargs):
        """Trains the trial's runs.

        Returns:
            The metrics of each at its best epoch, with "diverged", "epochs" and "seconds".

        Raises:
            keras_tuner.errors.FatalError: a failure that every other trial would share: a full
                disk, a missing data set ...
        """
        values, first, number = trial.hyperparameters.values, 0, self.args.executions
        if CONFIRMS in values:  # the next seeds
            first, number = number, self.args.confirm_runs
        try:
            return [self._run(trial, first + k) for k in range(number)]
        except (RecipeError, OSError) as error:
            raise kt.errors.FatalError(str(error)) from error

    def _run(self, trial, execution: int) -> dict[str, float]:
        """Trains one run of a trial."""
        started, values = time.monotonic(), trial.hyperparameters.values
        folder = Path(self.get_trial_dir(trial.trial_id), f"run-{execution}")
        parent = values.get("tuner/trial_id")
        if parent and not (folder / CONFIG).exists():
            _copy(Path(self.get_trial_dir(parent), folder.name), folder)
        settings = trial_settings(self.given, self.space, values)
        settings["seed"] = self.recipe.options(**settings).seed + execution
        settings["resume"] = (folder / CONFIG).exists()
        options = self.recipe.options(**settings)
        last = values.get("tuner/epochs") or options.epochs
        note, metrics = folder / "diverged.json", {}
        rows = read_history(folder / HISTORY)
        if not note.exists() and len(rows) < last:
            say = f"  seed {options.seed}, epoch"
            epochs = _Epochs(last, self.objective.name, say, self.report)
            try:
                result = run(self.recipe, options, folder, [epochs])
                if result is not None and "accuracy" in self.objective.name:
                    metrics[CHANCE] = 1 / result.data.num_outputs
            except TrainingDiverged as error:
                write_json(note, {"message": str(error)})
            rows = read_history(folder / HISTORY)
        if not self.args.keep_weights:
            (folder / BEST).unlink(missing_ok=True)
        if self.args.tuner != "hyperband":  # which resumes from it
            (folder / BACKUP).unlink(missing_ok=True)
        metrics |= self._metrics(rows[:last], note.exists())
        return {**metrics, "seconds": time.monotonic() - started}

    def _metrics(self, rows: Sequence[Mapping], diverged: bool) -> dict[str, float]:
        name, direction = self.objective.name, self.objective.direction
        if diverged or not rows or not all(math.isfinite(row[name]) for row in rows):
            return {name: worst_score(direction), DIVERGED: 1.0}
        best = (max if direction == "max" else min)(rows, key=lambda row: row[name])
        metrics = {key: value for key, value in best.items() if isinstance(value, float)}
        for key in ("clip_fraction", "grad_norm"):
            values = [row[key] for row in rows if not math.isnan(row.get(key, math.nan))]
            if values:  # an epoch without an update has NaN
                metrics[key] = math.fsum(values) / len(values)
        return {**metrics, DIVERGED: 0.0, "epochs": float(len(rows))}


def trial_settings(given: Mapping, space: Mapping, values: Mapping) -> dict[str, Any]:
    """The recipe options of a trial: the `given` ones, and its `values` of hyper-parameters."""
    settings = dict(given)
    if "learning_rate" in values:
        settings["learning_rate"] = float(f"{values['learning_rate']:.7g}")
    clipper = to_clipper(values, space.get("groups"))
    if clipper is None:
        settings["clipper"] = "none"
    else:
        settings["clip_config"] = kgc.serialize(clipper)
    gate = to_gate(values, 1.0)  # the recipe sets its own learning rate
    if gate is not None:
        settings["activation_gate"] = True
        settings |= {"gate_clip_value": gate.clip_value, "gate_gamma": gate.gamma}
    return settings


class _Epochs(keras.callbacks.Callback):
    """Reports each epoch, and ends a run after epoch `last`, before its schedule ends."""

    def __init__(self, last: int, metric: str, prefix: str, report: Callable[[str], object]):
        super().__init__()
        self.last, self.metric, self.prefix, self.report = last, metric, prefix, report

    def on_epoch_end(self, epoch, logs=None):
        logs = logs or {}
        if self.metric not in logs:
            raise RecipeError(f"--objective {self.metric}: not among {', '.join(sorted(logs))}")
        figure = f"{self.metric} {logs[self.metric]:.4f}"
        self.report(f"{self.prefix} {epoch + 1} of {self.last}: {figure}")
        if exploded(self.model):
            raise TrainingDiverged(f"a weight grew beyond {LARGEST_WEIGHT:g}", step=-1)
        if epoch + 1 >= self.last:
            self.model.stop_training = True


def _copy(source: Path, target: Path) -> None:
    """Copies a run atomically."""
    if not source.exists():
        raise RecipeError(
            f"{source} does not exist: Hyperband resumes from the folder of an earlier trial. All "
            "workers must share --output"
        )
    scratch = target.with_name(f".partial-{target.name}")
    for folder in (scratch, target):  # left by a killed process
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, scratch)
    os.replace(scratch, target)
