"""One trial of a search: runs of a recipe that differ only in their seeds."""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

import keras_gradclip as kgc
from keras_gradclip.files import write_json
from keras_gradclip.tuning.divergence import DIVERGED, LARGEST_WEIGHT, exploded, worst_score
from keras_gradclip.tuning.space import to_clipper, to_gate
from recipes.errors import RecipeError, TrainingDiverged
from recipes.training import Recipe, run
from recipes.training.folder import BACKUP, BEST, CONFIG, HISTORY, read_history

CHANCE = "chance"  # a metric: the accuracy of random guessing


@dataclass(frozen=True)
class TrialRunner:
    """Trains the runs of a trial, each in its own folder; resumes a run that was killed.

    Attributes:
        recipe: the recipe to search.
        given: the options that the user fixed, by name.
        space: arguments of `clip_hyperparameters`.
        objective: with `name`, a column of a run's `history.csv`, and `direction`.
        executions: runs of each trial, with consecutive seeds.
        confirm_executions: runs of a trial that repeats another, with the seeds after those.
        keep_weights: keep each run's `best.keras`.
        keep_backups: keep each run's backup, which Hyperband resumes from.
        report: called with a line of text at the end of each epoch.
    """

    recipe: Recipe
    given: Mapping[str, Any]
    space: Mapping[str, Any]
    objective: Any
    executions: int = 1
    confirm_executions: int = 5
    keep_weights: bool = False
    keep_backups: bool = False
    report: Callable[[str], object] = print

    def run(
        self,
        values: Mapping[str, Any],
        folder: Path,
        confirms: bool = False,
        last: int | None = None,
        parent: Path | None = None,
    ) -> list[dict[str, float]]:
        """Trains the runs of a trial.

        Args:
            values: its hyper-parameters by name.
            folder: the trial's folder.
            confirms: whether it repeats another trial.
            last: the epoch after which runs end; None for the recipe's own.
            parent: folder of the trial whose runs these continue.

        Returns:
            The metrics of each run at its best epoch, with "diverged", "epochs" and "seconds".

        Raises:
            RecipeError, OSError: a failure that every other trial would share.
        """
        first, number = 0, self.executions
        if confirms:
            first, number = self.executions, self.confirm_executions
        results = []
        for execution in range(first, first + number):
            run_folder = folder / f"run-{execution}"
            if parent is not None and not (run_folder / CONFIG).exists():
                _copy(parent / run_folder.name, run_folder)
            settings = trial_settings(self.given, self.space, values)
            settings["seed"] = self.recipe.options(**settings).seed + execution
            settings["resume"] = (run_folder / CONFIG).exists()
            options = self.recipe.options(**settings)
            results.append(self._train(options, run_folder, last or options.epochs))
        return results

    def _train(self, options, folder: Path, last: int) -> dict[str, float]:
        note = folder / "diverged.json"
        started = time.monotonic()
        rows = read_history(folder / HISTORY)
        epochs = _Epochs(last, self.objective.name, f"  seed {options.seed}, epoch", self.report)
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
        metrics = self._metrics(rows[:last], note.exists())
        if epochs.classes and "accuracy" in self.objective.name:
            metrics[CHANCE] = 1 / epochs.classes
        return {**metrics, "seconds": time.monotonic() - started}

    def _metrics(self, rows: Sequence[Mapping], diverged: bool) -> dict[str, float]:
        name, direction = self.objective.name, self.objective.direction
        if diverged or not rows or not all(math.isfinite(row[name]) for row in rows):
            return {name: worst_score(direction), DIVERGED: 1.0}
        best = (max if direction == "max" else min)(rows, key=lambda row: row[name])
        metrics = {key: value for key, value in best.items() if isinstance(value, float)}
        for key in ("clip_fraction", "grad_norm"):
            if key in best:
                metrics[key] = math.fsum(row[key] for row in rows) / len(rows)
        return {**metrics, DIVERGED: 0.0, "epochs": float(len(rows))}


def trial_settings(given: Mapping, space: Mapping, values: Mapping) -> dict[str, Any]:
    """The recipe options of a trial: the user's fixed ones, and those that the trial sets.

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
        self.classes = 0

    def on_epoch_end(self, epoch, logs=None):
        logs = logs or {}
        if self.metric not in logs:
            raise RecipeError(f"--objective {self.metric}: not among {', '.join(sorted(logs))}")
        shape = self.model.output_shape
        self.classes = max(shape[-1], 2) if isinstance(shape, tuple) else 0
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
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(scratch)
    shutil.copytree(source, scratch)
    if target.exists():
        shutil.rmtree(target)
    os.replace(scratch, target)
