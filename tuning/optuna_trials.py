"""Reads an Optuna study; a retried trial keeps its first number."""

import math
from dataclasses import dataclass

import optuna
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from tuning.rows import TrialRow, ranked
from tuning.trial_runner import trial_row

MOST_LOSSES = MOST_FAILURES = 3
#: User attributes of a trial.
BASELINE, CONFIRMS, METRICS = "baseline", "confirms", "metrics"
VALUES, ERROR, SURPLUS = "values", "error", "surplus"
_STATES = {
    TrialState.COMPLETE: "completed",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
}


def origin(trial: FrozenTrial) -> int:
    """The number of the trial that this one runs again, else its own."""
    first = RetryHeartbeatStaleTrialCallback.retried_trial_number(trial)
    return trial.number if first is None else first


def name_of(trial: FrozenTrial) -> str:
    """The first trial's number."""
    return f"{origin(trial):04d}"


@dataclass(frozen=True)
class Trials:
    """The trials of a study."""

    study: optuna.Study

    def by_name(self) -> dict[str, FrozenTrial]:
        """Of a trial that was run again, the last."""
        trials = self.study.get_trials(deepcopy=False)
        return {name_of(t): t for t in trials if SURPLUS not in t.user_attrs}

    def finished(self) -> list[str]:
        """The names of those that ended, however they did."""
        return [name for name, trial in self.by_name().items() if trial.state.is_finished()]

    def frozen(self, trial: optuna.Trial) -> FrozenTrial:
        """What the study knows of a trial that runs."""
        return self.study.get_trials(deepcopy=False)[trial.number]

    def check_failures(self) -> None:
        """Three failures in a row end a search, as with KerasTuner."""
        ended = [trial for trial in self.by_name().values() if trial.datetime_complete]
        ended.sort(key=lambda trial: str(trial.datetime_complete))
        errors = [trial.user_attrs.get(ERROR) for trial in ended[-MOST_FAILURES:]]
        if len(errors) == MOST_FAILURES and all(errors):
            raise RuntimeError(f"{MOST_FAILURES} trials in a row failed; the last: {errors[-1]}")

    def rows(self, direction: str) -> list[TrialRow]:
        """As `tuning.rows.ranked` orders them."""
        rows = []
        for name, trial in self.by_name().items():
            attributes = trial.user_attrs
            rows.append(
                trial_row(
                    name,
                    _STATES[trial.state],
                    attributes.get(VALUES, trial.params),
                    math.nan if trial.value is None else trial.value,
                    attributes.get(METRICS, {}),
                    baseline=BASELINE in attributes,
                    confirms=attributes.get(CONFIRMS, ""),
                    message=attributes.get(ERROR, f"{MOST_LOSSES} workers were lost in it"),
                )
            )
        return ranked(rows, direction)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """(low, high) of the numbers that were suggested."""
        result = {}
        for trial in self.by_name().values():
            for name, distribution in trial.distributions.items():
                low, high = getattr(distribution, "low", None), getattr(distribution, "high", None)
                choices = getattr(distribution, "choices", ())
                if choices and all(isinstance(choice, float) for choice in choices):
                    low, high = min(choices), max(choices)
                if low is not None and high is not None:
                    result[name] = (low, high)
        return result
