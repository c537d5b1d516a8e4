"""The private names of KerasTuner that this package uses; no other module uses any.

KerasTuner has no hooks for the trial of a lost worker, for atomic files, or for the end of a search
with running trials. `tests/tuning/test_kerastuner.py` has the use of each name.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import keras_tuner as kt
from keras_tuner.engine.base_tuner import BaseTuner  # the loop of a search, without Keras's own fit
from keras_tuner.engine.metrics_tracking import infer_metric_direction  # "max" of "val_accuracy"
from keras_tuner.engine.trial import Trial, TrialStatus

from keras_gradclip.files import read_json, write_json

__all__ = [
    "OracleInternals",
    "SearchTuner",
    "Trial",
    "TrialStatus",
    "infer_metric_direction",
    "mark_for_reload",
]


def mark_for_reload(folder: str | os.PathLike) -> None:
    """Makes a tuner resume the oracle saved in `folder`, if there is one.

    KerasTuner reloads only if its tuner's (empty) file exists, which it first writes at the end of
    a trial: a search killed in its first trial would start again.
    """
    folder = Path(folder)
    for path in (folder / "oracle.json", *folder.glob("trial_*/trial.json")):
        if path.exists():
            read_json(path)  # names a damaged file, which KerasTuner would not
    if (folder / "oracle.json").exists():
        name = os.environ.get("KERASTUNER_TUNER_ID", "tuner0")
        (folder / f"{name}.json").write_text("{}")


class SearchTuner(BaseTuner):
    """A tuner without a model, whose `run_trial` returns a list of dicts.

    Each dict has the metrics of one run of the trial. KerasTuner stores them as one observation
    with several values, whose mean is the trial's score; its own tuners report only the mean.

    Args:
        oracle: `keras_tuner.Oracle`.
        directory, project_name: as for KerasTuner's tuners; a search there is resumed.
    """

    def __init__(self, oracle: kt.Oracle, directory: str | os.PathLike, project_name: str) -> None:
        self._asked = False
        mark_for_reload(Path(directory) / project_name)
        super().__init__(oracle, directory=str(directory), project_name=project_name)

    def pre_create_trial(self) -> None:
        """Waits a second before KerasTuner repeats a request that got no trial."""
        if self._asked:
            time.sleep(1)
        self._asked = True

    def on_trial_begin(self, trial: Trial) -> None:
        """Notes that the next request follows a trial."""
        self._asked = False

    def _run_and_update_trial(self, trial: Trial, *fit_args: object, **fit_kwargs: object) -> None:
        for metrics in self.run_trial(trial, *fit_args, **fit_kwargs):
            self.oracle.update_trial(trial.trial_id, metrics)


class OracleInternals(kt.Oracle):
    """Access to an oracle's private state, with atomic files."""

    trials: dict[str, Trial]

    @property
    def running(self) -> dict[str, Trial]:
        """The running trial of each busy worker."""
        return self.ongoing_trials

    @property
    def workers(self) -> set[str]:
        """The ids of the workers that are connected and were not sent "stop"."""
        return self.tuner_ids

    @property
    def waiting(self) -> list[str]:
        """The ids of trials to repeat, the next one last."""
        return self._retry_queue

    @property
    def ended(self) -> list[str]:
        """The ids of finished trials."""
        return self.end_order

    @contextlib.contextmanager
    def seeing_only(self, trials: Sequence[Trial]) -> Iterator[None]:
        """Hides all other trials from KerasTuner's algorithm within the context."""
        everything, self.trials = self.trials, {trial.trial_id: trial for trial in trials}
        try:
            yield
        finally:
            self.trials = everything

    def forget_metrics(self, trial: Trial) -> None:
        """Drops the metrics of an unfinished trial, which would count twice."""
        trial.metrics = type(trial.metrics)()

    def save(self) -> None:
        """Writes `oracle.json` atomically; converts default dicts and NumPy numbers."""
        write_json(self._get_oracle_fname(), self.get_state(), default=float)

    def _save_trial(self, trial: Trial) -> None:
        write_json(
            Path(self._get_trial_dir(trial.trial_id)) / "trial.json",
            trial.get_state(),
            default=float,
        )

    def reload(self) -> None:
        """Reloads as KerasTuner does, after a kill at any moment."""
        super().reload()
        waiting = []
        for trial_id in sorted(self.trials):
            trial = self.trials[trial_id]
            if trial_id not in self.start_order:  # killed before the oracle's file was written
                self.start_order.append(trial_id)
            if trial.status in (TrialStatus.COMPLETED, TrialStatus.FAILED):
                if trial_id not in self.end_order:
                    self.end_order.append(trial_id)
            else:
                self.forget_metrics(trial)
                trial.status = TrialStatus.RUNNING
                waiting.append(trial_id)
        self._retry_queue = waiting[::-1]  # taken from the end: the oldest first
