"""Every private name of KerasTuner that this package uses, and nowhere else.

KerasTuner has no hooks for a trial whose worker is lost, for files that a kill cannot tear, or
for the end of a search with trials still out. `missing_names` says what a new version changed.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras_tuner as kt
from keras_tuner.engine.base_tuner import BaseTuner  # the loop of a search, without Keras's own fit
from keras_tuner.engine.metrics_tracking import infer_metric_direction  # "max" of "val_accuracy"
from keras_tuner.engine.trial import TrialStatus

from keras_gradclip.files import read_json, write_json

__all__ = [
    "OracleInternals",
    "SearchTuner",
    "TrialStatus",
    "infer_metric_direction",
    "mark_for_reload",
    "missing_names",
]

_REASONS = {
    "ongoing_trials": "which worker runs which trial: a lost worker's is taken from it",
    "tuner_ids": "the workers that the chief waits for at the end: a lost one is struck off",
    "_retry_queue": "the trials that the next worker who asks gets",
    "start_order": "Hyperband and the Bayesian search read it: completed after a kill",
    "end_order": "the trials that are over: completed after a kill; no trial ends twice",
    "_get_trial_dir": "where `trial.json` is, to replace it as a whole",
    "_get_oracle_fname": "where `oracle.json` is, to replace it as a whole",
    "_save_trial": "overridden: KerasTuner writes in place, where a kill tears the file",
}


def missing_names() -> dict[str, str]:
    """The private names that the installed KerasTuner lacks, and what each is used for."""
    oracle = kt.oracles.RandomSearchOracle("val_loss", 1)
    missing = {name: why for name, why in _REASONS.items() if not hasattr(oracle, name)}
    tuner = {
        "_get_tuner_fname": "a tuner reloads where it finds this file",
        "_run_and_update_trial": "overridden: reports each run of a trial",
    }
    return missing | {name: why for name, why in tuner.items() if not hasattr(BaseTuner, name)}


def mark_for_reload(folder: str | os.PathLike) -> None:
    """Makes a tuner resume the oracle saved in `folder`, if there is one.

    KerasTuner reloads where it finds its tuner's file, which has nothing in it and which it first
    writes at the end of a trial: a search killed in its first trial would start anew.
    """
    folder = Path(folder)
    for path in (folder / "oracle.json", *folder.glob("trial_*/trial.json")):
        if path.exists():
            read_json(path)  # KerasTuner would not say which file is damaged
    if (folder / "oracle.json").exists():
        name = os.environ.get("KERASTUNER_TUNER_ID", "tuner0")
        (folder / f"{name}.json").write_text("{}")


class SearchTuner(BaseTuner):
    """A tuner without a model of its own, for a `run_trial` that returns a list of dicts.

    They are the metrics of each run of the trial. KerasTuner keeps them as one observation of
    several values, whose mean is the trial's score; its own tuners report the mean alone.

    Args:
        oracle: `keras_tuner.Oracle`.
        directory, project_name: as of KerasTuner's tuners; a search there is resumed.
    """

    def __init__(self, oracle: kt.Oracle, directory: str | os.PathLike, project_name: str):
        self._asked = False
        mark_for_reload(Path(directory) / project_name)
        super().__init__(oracle, directory=str(directory), project_name=project_name)

    def pre_create_trial(self):
        """Waits a second where KerasTuner asks again at once, since there is nothing to do."""
        if self._asked:
            time.sleep(1)
        self._asked = True

    def on_trial_begin(self, trial):
        """The next request comes after work."""
        self._asked = False

    def _run_and_update_trial(self, trial, *fit_args, **fit_kwargs):
        for metrics in self.run_trial(trial, *fit_args, **fit_kwargs):
            self.oracle.update_trial(trial.trial_id, metrics)


class OracleInternals(kt.Oracle):
    """The state of an oracle by plain names, and its files, replaced as a whole."""

    trials: dict[str, Any]

    @property
    def running(self) -> dict[str, Any]:
        """The trial of each worker that has one."""
        return self.ongoing_trials

    @property
    def workers(self) -> set[str]:
        """The ids of the workers that have asked and were not told to stop."""
        return self.tuner_ids

    @property
    def waiting(self) -> list[str]:
        """The ids of trials to be run again, the next one last."""
        return self._retry_queue

    @property
    def ended(self) -> list[str]:
        """The ids of the trials that are over."""
        return self.end_order

    @contextlib.contextmanager
    def seeing_only(self, trials: list) -> Iterator[None]:
        """While open, KerasTuner's algorithm knows of these trials alone."""
        everything, self.trials = self.trials, {trial.trial_id: trial for trial in trials}
        try:
            yield
        finally:
            self.trials = everything

    def forget_metrics(self, trial) -> None:
        """Drops what an unfinished trial has reported, which would count twice."""
        trial.metrics = type(trial.metrics)()

    def save(self):
        """Writes `oracle.json` whole or not at all; it holds default dicts and NumPy numbers."""
        write_json(self._get_oracle_fname(), self.get_state(), default=float)

    def _save_trial(self, trial):
        write_json(
            Path(self._get_trial_dir(trial.trial_id)) / "trial.json",
            trial.get_state(),
            default=float,
        )

    def reload(self):
        """As KerasTuner's, from whatever moment a kill came at."""
        super().reload()
        waiting = []
        for trial_id in sorted(self.trials):
            trial = self.trials[trial_id]
            if trial_id not in self.start_order:  # its file was written, the oracle's was not
                self.start_order.append(trial_id)
            if trial.status in (TrialStatus.COMPLETED, TrialStatus.FAILED):
                if trial_id not in self.end_order:
                    self.end_order.append(trial_id)
            else:
                self.forget_metrics(trial)
                trial.status = TrialStatus.RUNNING
                waiting.append(trial_id)
        self._retry_queue = waiting[::-1]  # taken from the end: the oldest first
