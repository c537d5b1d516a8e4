"""KerasTuner's tuner and oracle, extended to survive kills, divergence and lost workers.

KerasTuner has no hooks for the trial of a lost worker, for atomic files, or for the end of a search
with running trials, so this module uses its internal names, and no other does;
`tests/tuning/test_kerastuner.py` has the use of each.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import keras_tuner as kt
from keras_tuner.engine.base_tuner import BaseTuner  # the loop of a search, without Keras's own fit
from keras_tuner.engine.metrics_tracking import infer_metric_direction as infer_metric_direction
from keras_tuner.engine.trial import Trial

from keras_gradclip.files import read_json, write_json
from keras_gradclip.tuning.space import Values, combinations

#: What `keras_tuner.Oracle.populate_space` returns: `status`, and `values` or None.
Answer: TypeAlias = dict[str, str | Values | None]

#: Key that marks the baseline; KerasTuner's own keys begin with tuner/, too.
BASELINE = "tuner/baseline"
#: Key with the id of the trial that this one repeats.
CONFIRMS = "tuner/confirms"
MOST_LOSSES = 3
STOPPED: Answer = {"status": "STOPPED", "values": None}


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


class SearchOracle(kt.Oracle):
    """A mixin, to be listed before one of KerasTuner's oracles.

    - The first trial has the default values: the unclipped baseline.
    - A diverged trial is COMPLETED with a score of -inf (or +inf), so it ranks last.
    - Files are written atomically, and a reload repeats no finished trial.
    - An idle worker gets no "stop" while a running trial may still be lost.

    Attributes:
        search_trials: the number of trials without confirmations; None: the algorithm decides.
        confirm: at the end, retrain the best clipped and the best unclipped trial with other
            seeds, because the best score of many trials is biased.
        on_change: a function called as `on_change(trial, event)` with event "begin" or "end", on
            the oracle's machine.
    """

    trials: dict[str, Trial]
    search_trials: int | None = None
    confirm: bool = False
    on_change: Callable[[Trial, str], object] = staticmethod(lambda trial, event: None)

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._losses: dict[str, int] = {}

    # Which trial comes next ------------------------------------------------------------------

    def populate_space(self, trial_id: str) -> Answer:
        """Returns the default values first, then those of the algorithm, then confirmations."""
        if not self.trials:
            defaults = next(combinations(self.get_space()))
            return {"status": "RUNNING", "values": self._baseline(defaults)}
        own = [t for t in self.trials.values() if CONFIRMS not in t.hyperparameters.values]
        if self.search_trials and len(own) >= self.search_trials:
            return self._confirmation(own)
        with self.seeing_only(own):
            answer = self.next_values(trial_id)
        return self._confirmation(own) if answer["status"] == "STOPPED" else answer

    def next_values(self, trial_id: str) -> Answer:
        """The algorithm's answer."""
        return super().populate_space(trial_id)

    def _baseline(self, values: Values) -> Values:
        return {**values, BASELINE: True}

    def _confirmation(self, own: Sequence[Trial]) -> Answer:
        if not self.confirm:
            return STOPPED
        if any(trial in self.ongoing_trials.values() for trial in own) or self._retry_queue:
            return {"status": "IDLE", "values": None}
        ended = [t for t in own if t.status == "COMPLETED"]
        if not any(math.isfinite(trial.score) for trial in ended):
            return STOPPED
        sign = -1 if self.objective.direction == "max" else 1
        ended.sort(key=lambda t: (sign * t.score, t.trial_id))  # a reload loses their order
        # The best of each kind, even if all of it diverged: with other seeds it may not.
        best = {t.hyperparameters.values["clipper"] == "none": t for t in reversed(ended)}
        chosen = sorted(best.values(), key=ended.index)  # the better one first
        confirmed = {t.hyperparameters.values.get(CONFIRMS) for t in self.trials.values()}
        for trial in chosen:
            if trial.trial_id not in confirmed:
                values = trial.hyperparameters.values
                again = {k: v for k, v in values.items() if not k.startswith("tuner/")}
                if "tuner/epochs" in values:
                    again["tuner/epochs"] = values["tuner/epochs"]
                return {"status": "RUNNING", "values": {**again, CONFIRMS: trial.trial_id}}
        return STOPPED

    @contextlib.contextmanager
    def seeing_only(self, trials: Sequence[Trial]) -> Iterator[None]:
        """Hides all other trials from KerasTuner's algorithm within the context."""
        everything, self.trials = self.trials, {trial.trial_id: trial for trial in trials}
        try:
            yield
        finally:
            self.trials = everything

    # Workers ---------------------------------------------------------------------------------

    @kt.synchronized
    def create_trial(self, tuner_id: str) -> Trial:
        """Overrides KerasTuner's: no worker gets "stop" while a trial may need to be repeated."""
        again = tuner_id in self.ongoing_trials
        trial = super().create_trial(tuner_id)
        if trial.status == "STOPPED" and self.ongoing_trials:
            self.tuner_ids.add(tuner_id)
            trial.status = "IDLE"
        if trial.status == "RUNNING" and not again:
            self.on_change(trial, "begin")
        return trial

    @kt.synchronized
    def update_trial(self, trial_id: str, metrics: Mapping[str, float], step: int = 0) -> Trial:
        """Overrides KerasTuner's: ignores reports on a finished trial, as from a lost worker."""
        if trial_id in self.end_order:
            return self.trials[trial_id]
        return super().update_trial(trial_id, metrics, step)

    @kt.synchronized
    def end_trial(self, trial: Trial) -> None:
        """Overrides KerasTuner's: keeps the original float64 values of the trial."""
        known = self.trials[trial.trial_id]
        if known.hyperparameters.values.keys() == trial.hyperparameters.values.keys():
            trial.hyperparameters = known.hyperparameters
        # A worker counted as lost may return, before or after its trial was repeated.
        if trial.trial_id in self.end_order:
            return
        if trial.trial_id in self._retry_queue:
            self._retry_queue.remove(trial.trial_id)
        super().end_trial(trial)
        self.on_change(self.trials[trial.trial_id], "end")

    @property
    def workers(self) -> set[str]:
        """The ids of the workers that have a trial, or were not sent "stop" yet."""
        return {*self.ongoing_trials, *self.tuner_ids}

    @kt.synchronized
    def lose_worker(self, tuner_id: str) -> str | None:
        """Queues the trial of a lost worker for another worker.

        A trial that has lost three workers, for example for lack of memory, is FAILED instead.

        Returns:
            The trial's id, or None if the worker had none.
        """
        trial = self.ongoing_trials.get(tuner_id)
        self.tuner_ids.discard(tuner_id)
        if trial is None:
            return None
        losses = self._losses[trial.trial_id] = self._losses.get(trial.trial_id, 0) + 1
        if losses >= MOST_LOSSES:
            trial.status = "FAILED"
            trial.message = f"{losses} workers were lost in it"
            self.end_trial(trial)
            return trial.trial_id
        del self.ongoing_trials[tuner_id]
        _forget_metrics(trial)
        self._retry_queue.append(trial.trial_id)
        self.save()
        return trial.trial_id

    # Files -----------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes `oracle.json` atomically; converts default dicts and NumPy numbers."""
        write_json(self._get_oracle_fname(), self.get_state(), default=float)

    def _save_trial(self, trial: Trial) -> None:
        path = Path(self._get_trial_dir(trial.trial_id)) / "trial.json"
        write_json(path, trial.get_state(), default=float)

    def reload(self) -> None:
        """Reloads as KerasTuner does, after a kill at any moment."""
        super().reload()
        waiting = []
        for trial_id in sorted(self.trials):
            trial = self.trials[trial_id]
            if trial_id not in self.start_order:  # killed before the oracle's file was written
                self.start_order.append(trial_id)
            if trial.status in ("COMPLETED", "FAILED"):
                if trial_id not in self.end_order:
                    self.end_order.append(trial_id)
            else:
                _forget_metrics(trial)
                trial.status = "RUNNING"
                waiting.append(trial_id)
        self._retry_queue = waiting[::-1]  # taken from the end: the oldest first


def _forget_metrics(trial: Trial) -> None:
    """Drops the metrics of an unfinished trial, which would count twice."""
    trial.metrics = type(trial.metrics)()
