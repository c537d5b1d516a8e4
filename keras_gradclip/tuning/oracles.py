"""KerasTuner's oracles, made to survive kills, divergence and lost workers.

What `SearchOracle` adds to each of them:

- the first trial has the default values: the unclipped baseline;
- at the end, the best clipped and the best unclipped trial may be trained again with other seeds,
  because the best of many is flattered by having been chosen;
- a trial that diverged is COMPLETED with a score of -inf (or +inf) and so ranks last;
- its files are replaced as a whole, and a reload runs no finished trial again;
- a worker that is idle gets no "stop" while trials are out that may come back;
- `lose_worker` takes a trial back from a lost worker.
"""

import copy
import math
from collections.abc import Callable, Iterator

import keras_tuner as kt

from keras_gradclip.tuning._kerastuner import OracleInternals, TrialStatus
from keras_gradclip.tuning._kerastuner import SearchTuner as SearchTuner  # public here

BASELINE = "tuner/baseline"  # marks the values of the baseline; KerasTuner's own are tuner/ too
CONFIRMS = "tuner/confirms"  # marks the values of a trial that repeats another, named here
MOST_LOSSES = 3


class SearchOracle(OracleInternals):
    """The additions; comes before one of KerasTuner's oracles among the bases.

    Attributes:
        on_change: None, or called as `on_change(trial, event)` with event "begin" or "end", on
            the machine of the oracle.
    """

    on_change: Callable | None = None
    #: Trials of the search itself; None for as many as the algorithm wants.
    search_trials: int | None = None
    confirm: bool = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._losses: dict[str, int] = {}

    def populate_space(self, trial_id):
        """The default values first, then what the algorithm wants."""
        if not self.trials:
            hps = self.get_space()
            values: dict = {}
            for hp in hps.space:
                hps.values = values
                if hps.is_active(hp):
                    values[hp.name] = hp.default
            return {"status": "RUNNING", "values": self._baseline(values)}
        own = [t for t in self.trials.values() if CONFIRMS not in t.hyperparameters.values]
        if self.search_trials and len(own) >= self.search_trials:
            return self._confirmation(own)
        with self.seeing_only(own):  # not those that confirm
            answer = self.next_values(trial_id)
        return self._confirmation(own) if answer["status"] == "STOPPED" else answer

    def next_values(self, trial_id):
        """What the algorithm wants next, as `keras_tuner.Oracle.populate_space`."""
        return super().populate_space(trial_id)

    def _confirmation(self, own):
        stopped = {"status": "STOPPED", "values": None}
        if not self.confirm:
            return stopped
        if any(trial in self.running.values() for trial in own) or self.waiting:
            return {"status": "IDLE", "values": None}
        ended = [t for t in own if t.status == "COMPLETED"]
        if not any(math.isfinite(trial.score) for trial in ended):
            return stopped
        sign = -1 if self.objective.direction == "max" else 1
        ended.sort(key=lambda t: (sign * t.score, t.trial_id))  # a reload keeps no order
        # Also where all of a kind diverged: do they with other seeds?
        clipped = [t for t in ended if t.hyperparameters.values["clipper"] != "none"]
        unclipped = [t for t in ended if t.hyperparameters.values["clipper"] == "none"]
        chosen = [*clipped[:1], *unclipped[:1]]
        chosen.sort(key=ended.index)  # the better one first, should this be interrupted
        confirmed = {t.hyperparameters.values.get(CONFIRMS) for t in self.trials.values()}
        for trial in chosen:
            if trial.trial_id not in confirmed:
                values = trial.hyperparameters.values
                again = {k: v for k, v in values.items() if not k.startswith("tuner/")}
                if "tuner/epochs" in values:
                    again["tuner/epochs"] = values["tuner/epochs"]
                return {"status": "RUNNING", "values": {**again, CONFIRMS: trial.trial_id}}
        return stopped

    def _baseline(self, values):
        return {**values, BASELINE: True}

    @kt.synchronized
    def create_trial(self, tuner_id):
        """As KerasTuner's, but nobody is sent home while a trial may still come back."""
        again = tuner_id in self.running
        trial = super().create_trial(tuner_id)
        if trial.status == TrialStatus.STOPPED and self.running:
            self.workers.add(tuner_id)
            trial.status = TrialStatus.IDLE
        if trial.status == TrialStatus.RUNNING and not again:
            self._notify(trial, "begin")
        return trial

    @kt.synchronized
    def update_trial(self, trial_id, metrics, step=0):
        """As KerasTuner's; a lost worker that comes back adds nothing to a trial that is over."""
        if trial_id in self.ended:
            return self.trials[trial_id]
        return super().update_trial(trial_id, metrics, step)

    @kt.synchronized
    def end_trial(self, trial):
        """As KerasTuner's; the values stay as they were given out, in float64."""
        known = self.trials[trial.trial_id]
        if known.hyperparameters.values.keys() == trial.hyperparameters.values.keys():
            trial.hyperparameters = known.hyperparameters
        # A worker that was given up may come back, after another has done its trial or before
        # another has begun it.
        if trial.trial_id in self.ended:
            return
        if trial.trial_id in self.waiting:
            self.waiting.remove(trial.trial_id)
        super().end_trial(trial)
        self._notify(self.trials[trial.trial_id], "end")

    @kt.synchronized
    def lose_worker(self, tuner_id: str):
        """Gives the trial of a lost worker to the next one that asks.

        A trial that has lost three workers, say for want of memory, is FAILED instead.

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

    def _notify(self, trial, event):
        if self.on_change is not None:
            self.on_change(trial, event)


class RandomOracle(SearchOracle, kt.oracles.RandomSearchOracle):
    """Random search."""


class BayesianOracle(SearchOracle, kt.oracles.BayesianOptimizationOracle):
    """Bayesian optimisation, to which a diverged trial is as bad as the worst that did not.

    KerasTuner turns an infinite score into 0, which is the best of all losses.
    """

    def next_values(self, trial_id):
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
    """Hyperband; the baseline runs outside of the brackets, with the full number of epochs."""

    def _baseline(self, values):
        whole = {"tuner/epochs": self.max_epochs, "tuner/initial_epoch": 0}
        return {**super()._baseline(values), **whole, "tuner/bracket": 0, "tuner/round": 0}


class GridOracle(SearchOracle):
    """Every combination once, defaults first, the last hyper-parameter fastest.

    Unlike KerasTuner's own, whose place in the grid is lost on a restart, it finds the next
    combination from the trials there are.
    """

    def next_values(self, trial_id):
        """The first combination that no trial has."""
        tried = {_key(trial.hyperparameters.values) for trial in self.trials.values()}
        for values in combinations(self.get_space()):
            if _key(values) not in tried:
                return {"status": "RUNNING", "values": values}
        return {"status": "STOPPED", "values": None}


def combinations(hps) -> Iterator[dict]:
    """All combinations of active values of a space, each parameter's default first."""
    grids = []
    for hp in hps.space:
        values = [hp.default, *(value for value in hp.values if value != hp.default)]
        grids.append((hp, values))

    def extend(values, rest):
        if not rest:
            yield dict(values)
            return
        (hp, grid), others = rest[0], rest[1:]
        hps.values = values
        if not hps.is_active(hp):
            yield from extend(values, others)
            return
        for value in grid:
            yield from extend({**values, hp.name: value}, others)

    yield from extend({}, grids)


def make_oracle(
    tuner: str, objective, max_trials: int | None = None, confirm: bool = False, **options
) -> SearchOracle:
    """The oracle of a kind.

    Args:
        tuner: "random", "bayesian", "hyperband" or "grid".
        objective: `keras_tuner.Objective`, or the name of one whose direction is known.
        max_trials: int, the baseline included; None for a whole grid, and for Hyperband, which
            takes `max_epochs` and decides itself.
        confirm: after that, repeat the best clipped and the best unclipped trial.
        **options: of the oracle: seed, hyperparameters, max_epochs, factor ...
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
    oracle.max_trials = None  # KerasTuner would count the trials that confirm
    oracle.search_trials, oracle.confirm = max_trials, confirm
    return oracle


def _key(values):
    """Values to compare: to the float32 that comes back from other machines."""
    return tuple(
        (name, f"{value:.6g}" if isinstance(value, float) else value)
        for name, value in sorted(values.items())
        if not name.startswith("tuner/")
    )
