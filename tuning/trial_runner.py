"""One trial of a search: runs of a recipe with different seeds."""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_gradclip as kgc
from keras_gradclip.files import write_json
from keras_gradclip.tuning.divergence import DIVERGED, LARGEST_WEIGHT, exploded, worst_score
from keras_gradclip.tuning.space import to_clipper, to_gate
from recipes.errors import RecipeError, TrainingDiverged
from tuning.rows import TrialRow

_SCORE = "run-{}"  # a metric a run: its score
_CHANCE = "chance"  # a metric: the accuracy of a model that guesses


class TrialRunner:
    """Runs trials of a recipe through `recipes.training.run`.

    Each run lives in a folder of its trial and goes on there after a kill, from its last backup.

    Args:
        recipe: `recipes.training.Recipe`.
        given: the options that the user fixed, by name.
        space: arguments of `clip_hyperparameters`.
        objective: with `name`, a column of a run's `history.csv`, and `direction`.
        executions: runs of each trial, with seeds in a row; their mean counts.
        confirm_executions: runs of a trial that confirms another, with seeds of its own.
        keep_weights: leave each run's `best.keras` in place.
        keep_backups: leave each run's backup in place, for Hyperband to go on from.
        report: called with a line of text at the end of each epoch.
    """

    def __init__(
        self,
        recipe,
        given: Mapping,
        space: Mapping,
        objective,
        executions: int = 1,
        confirm_executions: int = 5,
        keep_weights: bool = False,
        keep_backups: bool = False,
        report: Callable = print,
    ):
        self.recipe, self.given, self.space = recipe, dict(given), dict(space)
        self.objective, self.report = objective, report
        self.executions, self.confirm_executions = executions, confirm_executions
        self.keep_weights, self.keep_backups = keep_weights, keep_backups

    def options(self, values: Mapping, execution: int = 0, resume: bool = False):
        """The recipe's options of a trial.

        Args:
            values: of the trial's hyper-parameters.
            execution: int, which of the trial's runs; moves the seed.
            resume: whether that run goes on.

        Raises:
            RecipeError: options that do not go together.
        """
        settings = trial_settings(self.given, self.space, values)
        settings["seed"] = self.recipe.options(**settings).seed + execution
        return self.recipe.options(**settings, resume=resume)

    def run(
        self,
        values: Mapping,
        folder: Path,
        confirms: bool = False,
        last: int | None = None,
        parent: Path | None = None,
    ) -> dict[str, float]:
        """Trains the runs of a trial.

        Args:
            values: of its hyper-parameters.
            folder: of the trial; a run has a folder in it.
            confirms: whether it repeats another trial: other seeds, and more of them.
            last: int, the epoch after which runs end; None for the recipe's own.
            parent: folder of the trial whose runs these continue.

        Returns:
            The means of the runs' metrics, with "diverged", "chance" and each run's own score, for
            `trial_row`.

        Raises:
            RecipeError, OSError: what would be the same in every trial.
        """
        numbers = range(self.executions)
        if confirms:
            numbers = range(self.executions, self.executions + self.confirm_executions)
        results = []
        for number in numbers:
            run_folder = folder / f"run-{number}"
            if parent is not None and not (run_folder / "config.json").exists():
                _copy(parent / run_folder.name, run_folder)
            options = self.options(values, number, (run_folder / "config.json").exists())
            results.append(self._train(options, run_folder, last or options.epochs))
        scores = [result[self.objective.name] for result in results]
        means = {
            name: float(np.mean([result[name] for result in results]))
            for name in results[0]
            if all(name in result for result in results)
        }
        if any(result[DIVERGED] for result in results):
            means |= {self.objective.name: worst_score(self.objective.direction), DIVERGED: 1.0}
        return {**means, **{_SCORE.format(i): score for i, score in enumerate(scores)}}

    def _train(self, options, folder, last) -> dict[str, float]:
        from recipes.training import run
        from recipes.training.folder import BACKUP, BEST, HISTORY, read_history

        note = folder / "diverged.json"
        started = time.monotonic()
        rows = read_history(folder / HISTORY)
        epochs = _Epochs(last, self.objective.name, self.report)
        if not note.exists() and len(rows) < last:
            try:
                run(self.recipe, options, folder, [epochs])
            except TrainingDiverged as error:
                write_json(note, {"message": str(error)})
            rows = read_history(folder / HISTORY)
        if not self.keep_weights:
            (folder / BEST).unlink(missing_ok=True)
        if not self.keep_backups:
            (folder / BACKUP).unlink(missing_ok=True)
        numbers = self._metrics(rows[:last], note.exists())
        if epochs.classes and "accuracy" in self.objective.name:
            numbers[_CHANCE] = 1 / epochs.classes
        return {**numbers, "seconds": time.monotonic() - started}

    def _metrics(self, rows: Sequence[Mapping], diverged: bool) -> dict[str, float]:
        name, direction = self.objective.name, self.objective.direction
        if diverged or not rows or not all(math.isfinite(row[name]) for row in rows):
            return {name: worst_score(direction), DIVERGED: 1.0}
        best = (max if direction == "max" else min)(rows, key=lambda row: row[name])
        numbers = {key: value for key, value in best.items() if isinstance(value, float)}
        for key in ("clip_fraction", "grad_norm"):
            if key in best:
                numbers[key] = float(np.mean([row[key] for row in rows]))
        return {**numbers, DIVERGED: 0.0, "epochs": float(len(rows))}


def trial_row(
    trial: str,
    status: str,
    values: Mapping,
    score: float,
    metrics: Mapping[str, float],
    **more: Any,
) -> TrialRow:
    """The row of a trial from the metrics of `TrialRunner.run`."""
    scores: list[float] = []
    while _SCORE.format(len(scores)) in metrics:
        scores.append(metrics[_SCORE.format(len(scores))])
    if status == "completed" and (metrics.get(DIVERGED, 0) > 0 or not math.isfinite(score)):
        status = "diverged"
    known = ("chance", "clip_fraction", "grad_norm", "epochs", "seconds")
    figures: dict[str, Any] = {name: metrics[name] for name in known if name in metrics}
    return TrialRow(trial, status, dict(values), score, tuple(scores), **figures, **more)


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
        self.classes = 0

    def on_epoch_end(self, epoch, logs=None):
        logs = logs or {}
        if self.metric not in logs:
            raise RecipeError(f"--objective {self.metric}: not among {', '.join(sorted(logs))}")
        shape = self.model.output_shape
        self.classes = max(shape[-1], 2) if isinstance(shape, tuple) else 0
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
