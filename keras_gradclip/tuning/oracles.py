"""KerasTuner's oracles as `SearchOracle`s, and a grid search that survives a restart."""

from __future__ import annotations

import copy
import math

import keras_tuner as kt

from keras_gradclip._validation import choice, steps
from keras_gradclip.tuning._kerastuner import (
    BASELINE,
    CONFIRMS,
    STOPPED,
    Answer,
    SearchOracle,
    SearchTuner,
)
from keras_gradclip.tuning.space import Values, combinations

__all__ = ["BASELINE", "CONFIRMS", "SearchOracle", "SearchTuner", "make_oracle"]


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
        return STOPPED


def _key(values: Values) -> tuple:
    """Values rounded for comparison, because workers return them as float32."""
    return tuple(
        (name, f"{value:.6g}" if isinstance(value, float) else value)
        for name, value in sorted(values.items())
        if not name.startswith("tuner/")
    )


ORACLES = {
    "random": RandomOracle,
    "bayesian": BayesianOracle,
    "hyperband": HyperbandOracle,
    "grid": GridOracle,
}


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
    choice("make_oracle", "tuner", tuner, tuple(ORACLES))
    max_trials = steps("make_oracle", "max_trials", max_trials)
    if max_trials is None and tuner in ("random", "bayesian"):
        raise ValueError(f"make_oracle: `max_trials` must be a number for {tuner!r}.")
    oracle = ORACLES[tuner](objective=objective, **options)
    oracle.max_trials = None  # KerasTuner would count confirming trials
    oracle.search_trials, oracle.confirm = max_trials, confirm
    return oracle
