"""KerasTuner's oracles, extended to survive kills, divergence and lost workers.

`SearchOracle` adds to each of them:

- the first trial has the default values: the unclipped baseline;
- at the end, the best clipped and the best unclipped trial may be retrained with other seeds,
  because the best score of many trials is biased;
- a diverged trial is COMPLETED with a score of -inf (or +inf), so it ranks last;
- its files are written atomically, and a reload repeats no finished trial;
- an idle worker gets no "stop" while a running trial may still be lost;
- `lose_worker` reassigns the trial of a lost worker.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import keras_tuner as kt

from keras_gradclip.tuning._kerastuner import OracleInternals, Trial, TrialStatus
from keras_gradclip.tuning._kerastuner import SearchTuner as SearchTuner  # public here
from keras_gradclip.tuning.space import Value

#: A trial's hyper-parameters by name.
Values: TypeAlias = dict[str, Value]
#: What `keras_tuner.Oracle.populate_space` returns: `status`, and `values` or None.
Answer: TypeAlias = dict[str, str | Values | None]

#: Key that marks the baseline; KerasTuner's own keys begin with tuner/, too.
BASELINE = "tuner/baseline"
#: Key with the id of the trial that this one repeats.
CONFIRMS = "tuner/confirms"
MOST_LOSSES = 3
_STOPPED: Answer = {"status": "STOPPED", "values": None}


class SearchOracle(OracleInternals):
    """Mixin with the additions, to be listed before one of KerasTuner's oracles.

    Attributes:
        on_change: None, or a function called as `on_change(trial, event)` with event "begin" or
            "end", on the oracle's machine.
    """

    on_change: Callable[[Trial, str], object] | None = None
    #: Trials without confirmations; None: the algorithm decides.
    search_trials: int | None = None
    confirm: bool = False

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._losses: dict[str, int] = {}

    def populate_space(self, trial_id: str) -> Answer:
        """Returns the default values first, then those of the algorithm."""
        if not self.trials:
            hps = self.get_space()
            values: Values = {}
            for hp in hps.space:
                hps.values = values
                if hps.is_active(hp):
                    values[hp.name] = hp.default
            return {"status": "RUNNING", "values": self._baseline(values)}
        own = [t for t in self.trials.values() if CONFIRMS not in t.hyperparameters.values]
        if self.search_trials and len(own) >= self.search_trials:
            return self._confirmation(own)
        with self.seeing_only(own):  # hides confirming trials
            answer = self.next_values(trial_id)
        return self._confirmation(own) if answer["status"] == "STOPPED" else answer

    def next_values(self, trial_id: str) -> Answer:
        """The algorithm's answer."""
        return super().populate_space(trial_id)

    def _confirmation(self, own: Sequence[Trial]) -> Answer:
        if not self.confirm:
            return _STOPPED
        if any(trial in self.running.values() for trial in own) or self.waiting:
            return {"status": "IDLE", "values": None}
        ended = [t for t in own if t.status == "COMPLETED"]
        if not any(math.isfinite(trial.score) for trial in ended):
            return _STOPPED
        sign = -1 if self.objective.direction == "max" else 1
        ended.sort(key=lambda t: (sign * t.score, t.trial_id))  # a reload loses their order
        # Of each kind the best, even if all of it diverged: other seeds may not.
        best = {t.hyperparameters.values["clipper"] == "none": t for t in reversed(ended)}
        chosen = sorted(best.values(), key=ended.index)  # the better first: it may be interrupted
        confirmed = {t.hyperparameters.values.get(CONFIRMS) for t in self.trials.values()}
        for trial in chosen:
            if trial.trial_id not in confirmed:
                values = trial.hyperparameters.values
                again = {k: v for k, v in values.items() if not k.startswith("tuner/")}
                if "tuner/epochs" in values:
                    again["tuner/epochs"] = values["tuner/epochs"]
                return {"status": "RUNNING", "values": {**again, CONFIRMS: trial.trial_id}}
        return _STOPPED

    def _baseline(self, values: Values) -> Values:
        return {**values, BASELINE: True}

    @kt.synchronized
    def create_trial(self, tuner_id: str) -> Trial:
        """Overrides KerasTuner's: no worker gets "stop" while a trial may need to be repeated."""
        again = tuner_id in self.running
        trial = super().create_trial(tuner_id)
        if trial.status == TrialStatus.STOPPED and self.running:
            self.workers.add(tuner_id)
            trial.status = TrialStatus.IDLE
        if trial.status == TrialStatus.RUNNING and not again:
            self._notify(trial, "begin")
        return trial

    @kt.synchronized
    def update_trial(self, trial_id: str, metrics: Mapping[str, float], step: int = 0) -> Trial:
        """Overrides KerasTuner's: ignores reports on a finished trial, as from a lost worker."""
        if trial_id in self.ended:
            return self.trials[trial_id]
        return super().update_trial(trial_id, metrics, step)

    @kt.synchronized
    def end_trial(self, trial: Trial) -> None:
        """Overrides KerasTuner's: keeps the original float64 values of the trial."""
        known = self.trials[trial.trial_id]
        if known.hyperparameters.values.keys() == trial.hyperparameters.values.keys():
            trial.hyperparameters = known.hyperparameters
        # A worker counted as lost may return, before or after its trial was repeated.
        if trial.trial_id in self.ended:
            return
        if trial.trial_id in self.waiting:
            self.waiting.remove(trial.trial_id)
        super().end_trial(trial)
        self._notify(self.trials[trial.trial_id], "end")

    @kt.synchronized
    def lose_worker(self, tuner_id: str) -> str | None:
        """Queues the trial of a lost worker for another worker.

        A trial that has lost three workers, for example for lack of memory, is FAILED instead.

        Returns:
            The trial's id, or None if the worker had none.
        """
        trial = self.running.get(tuner_id)
        self.workers.discard(tuner_id)
        if trial is None:
            return None
        losses = self._losses[trial.trial_id] = self._losses.get(trial.trial_id, 0) + 1
        if losses >= MOST_LOSSES:
            trial.status = TrialStatus.FAILED
            trial.message = f"{losses} workers were lost in it"
            self.end_trial(trial)
            return trial.trial_id
        del self.running[tuner_id]
        self.forget_metrics(trial)
        self.waiting.append(trial.trial_id)
        self.save()
        return trial.trial_id

    def _notify(self, trial: Trial, event: str) -> None:
        if self.on_change is not None:
            self.on_change(trial, event)


class RandomOracle(SearchOracle, kt.oracles.RandomSearchOracle):
    """Random search."""


class BayesianOracle(SearchOracle, kt.oracles.BayesianOptimizationOracle):
    """Bayesian optimisation; a diverged trial counts as the worst finite score.

    KerasTuner would replace an infinite score by 0, the best possible loss.
    """

    def next_values(self, trial_id: str) -> Answer:
        """The next values, from a model over finite scores."""
        trials = list(self.trials.values())
        finite = [t.score for t in trials if t.score is not None and math.isfinite(t.score)]
        worst = (min if self.objective.direction == "max" else max)(finite, default=0.0)
        for i, trial in enumerate(trials):
            if trial.score is not None and math.isinf(trial.score):
                trials[i] = copy.copy(trial)
                trials[i].score = worst
        with self.seeing_only(trials):
            return super().next_values(trial_id)


class HyperbandOracle(SearchOracle, kt.oracles.HyperbandOracle):
    """Hyperband; the baseline runs outside the brackets, for all epochs."""

    def _baseline(self, values: Values) -> Values:
        whole = {"tuner/epochs": self.max_epochs, "tuner/initial_epoch": 0}
        return {**super()._baseline(values), **whole, "tuner/bracket": 0, "tuner/round": 0}


class GridOracle(SearchOracle):
    """Grid search: every combination once, defaults first, the last hyper-parameter fastest.

    Unlike KerasTuner's, it survives a restart, because it derives the next combination from the
    existing trials.
    """

    def next_values(self, trial_id: str) -> Answer:
        """The first combination that no trial has."""
        tried = {_key(trial.hyperparameters.values) for trial in self.trials.values()}
        for values in combinations(self.get_space()):
            if _key(values) not in tried:
                return {"status": "RUNNING", "values": values}
        return _STOPPED


def combinations(hps: kt.HyperParameters) -> Iterator[Values]:
    """All combinations of active values of a space, each parameter's default first."""

    def extend(values: Values, rest: Sequence) -> Iterator[Values]:
        if not rest:
            yield dict(values)
            return
        hp, *others = rest
        hps.values = values
        if not hps.is_active(hp):
            yield from extend(values, others)
            return
        for value in dict.fromkeys((hp.default, *hp.values)):
            yield from extend({**values, hp.name: value}, others)

    yield from extend({}, hps.space)


def make_oracle(
    tuner: str,
    objective: kt.Objective | str,
    max_trials: int | None = None,
    confirm: bool = False,
    **options: object,
) -> SearchOracle:
    """An oracle by the tuner's name.

    Args:
        tuner: "random", "bayesian", "hyperband" or "grid".
        objective: `keras_tuner.Objective`, or the name of one whose direction is known.
        max_trials: int, the baseline included; None for a whole grid, and for Hyperband, which
            needs `max_epochs` instead.
        confirm: then repeat the best clipped and the best unclipped trial.
        **options: the oracle's options: seed, hyperparameters, max_epochs, factor ...
    """
    kinds = {
        "random": RandomOracle,
        "bayesian": BayesianOracle,
        "hyperband": HyperbandOracle,
        "grid": GridOracle,
    }
    if tuner not in kinds:
        raise ValueError(f"make_oracle: `tuner`={tuner!r} must be one of {', '.join(kinds)}.")
    if max_trials is None and tuner in ("random", "bayesian"):
        raise ValueError(f"make_oracle: `max_trials` must be a number for {tuner!r}.")
    oracle = kinds[tuner](objective=objective, **options)
    oracle.max_trials = None  # KerasTuner would count confirming trials
    oracle.search_trials, oracle.confirm = max_trials, confirm
    return oracle


def _key(values: Values) -> tuple:
    """Values rounded for comparison, because workers return them as float32."""
    return tuple(
        (name, f"{value:.6g}" if isinstance(value, float) else value)
        for name, value in sorted(values.items())
        if not name.startswith("tuner/")
    )
