"""The oracles: the baseline, divergence, kills at any moment, lost workers. Nothing trains."""

import json
import math

import keras_tuner as kt
import pytest

from keras_gradclip.tuning._kerastuner import MOST_LOSSES
from keras_gradclip.tuning.divergence import worst_score
from keras_gradclip.tuning.oracles import BASELINE, CONFIRMS, make_oracle
from keras_gradclip.tuning.space import clip_hyperparameters

KINDS = ("random", "bayesian", "hyperband", "grid")


def space(**options):
    hp = kt.HyperParameters()
    clip_hyperparameters(hp, clippers=("none", "absolute", "norm"), rescale=("none",), **options)
    return hp


def oracle_in(folder, kind, max_trials=6, objective="val_accuracy", **options):
    """An oracle as a tuner sets it up, reloaded if the folder has one."""
    if kind == "hyperband":
        options |= {"max_epochs": 4, "factor": 2}
    hp = space(points=2 if kind == "grid" else None)
    oracle = make_oracle(kind, objective, max_trials, seed=7, hyperparameters=hp, **options)
    oracle._set_project_dir(str(folder), "trials")
    oracle.verbose = 0
    if (folder / "trials" / "oracle.json").exists():
        oracle.reload()
    return oracle


def finish(oracle, trial, score):
    name = oracle.objective.name
    oracle.update_trial(trial.trial_id, {name: score})
    trial.status = "COMPLETED"
    oracle.end_trial(trial)


def run_all(oracle, score, most=200):
    """Runs trials until the oracle says stop; returns their values in order."""
    started = []
    for _ in range(most):
        trial = oracle.create_trial("tuner0")
        if trial.status == "STOPPED":
            return started
        assert trial.status == "RUNNING"
        started.append(dict(trial.hyperparameters.values))
        finish(oracle, trial, score(trial.hyperparameters.values, len(started)))
    raise AssertionError("the oracle does not stop")


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_trial_is_the_unclipped_baseline_and_the_search_ends(kind, tmp_path):
    started = run_all(oracle_in(tmp_path, kind), lambda values, n: 0.5 + 0.01 * n)
    assert started[0]["clipper"] == "none" and started[0][BASELINE] is True
    assert not any(BASELINE in values for values in started[1:])
    assert any(values["clipper"] != "none" for values in started)
    if kind in ("random", "bayesian", "grid"):
        assert len(started) == (5 if kind == "grid" else 6)  # a grid of 1 + 2 + 2
    else:
        assert started[0]["tuner/epochs"] == 4  # as long as the finalists
        assert any(values.get("tuner/trial_id") for values in started)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss"])
def test_trials_that_diverge_rank_last_and_abort_nothing(kind, objective, tmp_path):
    oracle = oracle_in(tmp_path, kind, objective=objective, max_trials=9)
    worst = worst_score(oracle.objective.direction)
    # The baseline and every second trial: more than KerasTuner lets fail.
    started = run_all(oracle, lambda values, n: worst if n % 2 else 0.1 * n)
    ranked = oracle.get_best_trials(len(started))
    assert len(ranked) == len(started)
    finite = [math.isfinite(trial.score) for trial in ranked]
    assert finite == sorted(finite, reverse=True)
    assert not all(finite) and any(finite)


def test_bayesian_takes_a_diverged_trial_for_the_worst_there_is(tmp_path):
    oracle = oracle_in(tmp_path, "bayesian", objective="val_loss", num_initial_points=2)
    run_all(oracle, lambda values, n: math.inf if n in (2, 4) else float(n))
    seen = []
    oracle.gpr.fit = lambda x, y: seen.extend(y) or 1 / 0
    oracle.search_trials += 1
    with pytest.raises(ZeroDivisionError):
        oracle.create_trial("tuner0")
    assert seen == [1, 6, 3, 6, 5, 6]
    assert [t.score for t in oracle.trials.values()] == [1, math.inf, 3, math.inf, 5, 6]


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_goes_on_and_runs_no_finished_trial_again(kind, tmp_path):
    whole = run_all(oracle_in(tmp_path / "whole", kind), lambda values, n: 0.1 * n)
    assert len(whole) >= 4

    folder = tmp_path / "cut"
    before, oracle = [], oracle_in(folder, kind)
    for n in (1, 2):
        trial = oracle.create_trial("tuner0")
        before.append(dict(trial.hyperparameters.values))
        finish(oracle, trial, 0.1 * n)
    running = oracle.create_trial("tuner0")  # and here it is killed
    again = oracle_in(folder, kind)
    resumed = again.create_trial("tuner0")
    assert resumed.trial_id == running.trial_id
    assert resumed.hyperparameters.values == running.hyperparameters.values
    finish(again, resumed, 0.3)
    after = run_all(again, lambda values, n: 0.1 * (n + 3))
    together = [*before, running.hyperparameters.values, *after]
    if kind == "bayesian":  # its own random state is not kept
        assert len(together) == len(whole)
    else:
        assert together == whole


def test_a_kill_between_two_files_loses_nothing(tmp_path):
    oracle = oracle_in(tmp_path, "random")
    first = oracle.create_trial("tuner0")
    file = tmp_path / "trials" / "oracle.json"
    before_end = file.read_text()
    finish(oracle, first, 0.9)
    before_start = file.read_text()
    second = oracle.create_trial("tuner0")

    file.write_text(before_end)  # the first trial's end is in its own file alone
    again = oracle_in(tmp_path, "random")
    assert again.create_trial("tuner0").trial_id == second.trial_id

    file.write_text(before_start)  # the second trial's start is in its own file alone
    again = oracle_in(tmp_path, "random")
    assert again.create_trial("tuner0").trial_id == second.trial_id
    assert again.trials[first.trial_id].score == 0.9


def test_what_an_unfinished_run_reported_is_dropped(tmp_path):
    oracle = oracle_in(tmp_path, "random")
    trial = oracle.create_trial("tuner0")
    oracle.update_trial(trial.trial_id, {"val_accuracy": 0.9})
    again = oracle_in(tmp_path, "random")
    finish(again, again.create_trial("tuner0"), 0.1)
    assert again.get_best_trials()[0].score == 0.1


def test_files_are_whole_or_not_there(tmp_path):
    oracle = oracle_in(tmp_path, "random")
    finish(oracle, oracle.create_trial("tuner0"), -math.inf)
    names = [path.name for path in (tmp_path / "trials").rglob("*") if path.is_file()]
    assert sorted(names) == ["oracle.json", "trial.json"]
    for path in (tmp_path / "trials").rglob("*.json"):
        json.loads(path.read_text())
    assert oracle_in(tmp_path, "random").get_best_trials()[0].score == -math.inf


def test_an_idle_worker_waits_for_the_trials_of_others(tmp_path):
    oracle = oracle_in(tmp_path, "random", max_trials=2)
    first, second = oracle.create_trial("worker-0"), oracle.create_trial("worker-1")
    finish(oracle, first, 0.5)
    assert oracle.create_trial("worker-0").status == "IDLE"
    assert oracle.lose_worker("worker-1") == second.trial_id
    third = oracle.create_trial("worker-0")
    assert (third.trial_id, third.status) == (second.trial_id, "RUNNING")
    finish(oracle, third, 0.6)
    assert oracle.create_trial("worker-0").status == "STOPPED"
    assert not oracle.tuner_ids and not oracle.ongoing_trials
    assert oracle.lose_worker("worker-1") is None


@pytest.mark.parametrize("when", ["waiting", "running", "done"])
def test_a_worker_that_comes_back_counts_once(when, tmp_path):
    oracle = oracle_in(tmp_path, "random", max_trials=3)
    lost = oracle.create_trial("worker-0")
    oracle.lose_worker("worker-0")
    other = None
    if when != "waiting":
        other = oracle.create_trial("worker-1")
        assert other.trial_id == lost.trial_id
    if when == "done":
        finish(oracle, other, 0.5)
    finish(oracle, lost, 0.5)
    if when == "running":
        finish(oracle, other, 0.5)
    assert oracle.end_order == [lost.trial_id]
    assert oracle.create_trial("worker-1").trial_id != lost.trial_id
    assert oracle.trials[lost.trial_id].status == "COMPLETED"


def test_a_run_counts_once_whoever_reports_it(tmp_path):
    """A lost worker's reports go with it; once the trial is over it adds nothing."""
    oracle = oracle_in(tmp_path, "random", max_trials=2)
    trial = oracle.create_trial("worker-0")
    oracle.update_trial(trial.trial_id, {"val_accuracy": 0.1})
    oracle.lose_worker("worker-0")
    again = oracle.create_trial("worker-1")
    for score in (0.4, 0.6):
        oracle.update_trial(again.trial_id, {"val_accuracy": score})
    again.status = "COMPLETED"
    oracle.end_trial(again)
    oracle.update_trial(trial.trial_id, {"val_accuracy": 0.9})
    (observation,) = oracle.trials[trial.trial_id].metrics.get_history("val_accuracy")
    assert observation.value == [0.4, 0.6] and oracle.trials[trial.trial_id].score == 0.5


def test_a_trial_that_takes_its_workers_with_it_fails(tmp_path):
    oracle = oracle_in(tmp_path, "random", max_trials=2)
    ids = []
    for k in range(MOST_LOSSES):
        ids.append(oracle.create_trial(f"worker-{k}").trial_id)
        oracle.lose_worker(f"worker-{k}")
    assert set(ids) == {"0000"}
    assert oracle.trials["0000"].status == "FAILED"
    assert oracle.create_trial("worker-9").trial_id == "0001"


def test_listeners_hear_of_each_trial_once(tmp_path):
    heard = []
    oracle = oracle_in(tmp_path, "random", max_trials=2)
    oracle.on_change = lambda trial, event: heard.append((trial.trial_id, event))
    trial = oracle.create_trial("tuner0")
    oracle.create_trial("tuner0")  # asks again and gets the same
    finish(oracle, trial, 0.5)
    assert heard == [("0000", "begin"), ("0000", "end")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss"])
def test_the_best_clipped_and_unclipped_trial_are_confirmed(kind, objective, tmp_path):
    oracle = oracle_in(tmp_path, kind, objective=objective, confirm=True)
    scores = iter([0.5, 0.3, math.nan, 0.2, 0.7, *[0.4] * 200])
    sign = 1 if objective == "val_accuracy" else -1

    def score(values, n):
        if CONFIRMS in values:
            return 0.1
        value = next(scores)
        return sign * (-math.inf if math.isnan(value) else value)

    started = run_all(oracle, score)
    again = [values for values in started if CONFIRMS in values]
    assert started[-2:] == again and len(again) == 2
    assert sorted(values["clipper"] == "none" for values in again) == [False, True]
    for values in again:
        original = oracle.trials[values[CONFIRMS]]
        rivals = [
            sign * trial.score
            for trial in oracle.trials.values()
            if (trial.hyperparameters.values["clipper"] == "none") == (values["clipper"] == "none")
            and CONFIRMS not in trial.hyperparameters.values
        ]
        assert sign * original.score == max(rivals)
        for name, value in original.hyperparameters.values.items():
            if not name.startswith("tuner/") or name == "tuner/epochs":
                assert values[name] == value
    assert (
        oracle_in(tmp_path, kind, objective=objective, confirm=True).create_trial("tuner0").status
        == "STOPPED"
    )


def test_confirmation_waits_for_the_trials_of_others(tmp_path):
    oracle = oracle_in(tmp_path, "random", max_trials=2, confirm=True)
    first, second = oracle.create_trial("worker-0"), oracle.create_trial("worker-1")
    finish(oracle, first, 0.5)
    assert oracle.create_trial("worker-0").status == "IDLE"
    finish(oracle, second, 0.6)
    confirming = oracle.create_trial("worker-0")
    assert confirming.hyperparameters.values[CONFIRMS] == second.trial_id  # the better one first


@pytest.mark.parametrize("clipped", [True, False])
def test_a_kind_that_always_diverged_is_confirmed_too(clipped, tmp_path):
    """That one diverges and the other does not must show with other seeds as well."""
    oracle = oracle_in(tmp_path, "grid", confirm=True)

    def score(values, n):
        return -math.inf if (values["clipper"] != "none") == clipped else 0.1 * n

    started = run_all(oracle, score)
    again = [values["clipper"] != "none" for values in started if CONFIRMS in values]
    assert again == [not clipped, clipped]


def test_of_equal_trials_the_same_is_confirmed_after_a_reload(tmp_path):
    oracle = oracle_in(tmp_path, "random", max_trials=9, confirm=True)
    started = run_all(oracle, lambda values, n: 0.5)
    assert len(started) == 11
    again = oracle_in(tmp_path, "random", max_trials=9, confirm=True)
    again.trials = dict(reversed(again.trials.items()))  # as a file system may list them
    assert again.create_trial("tuner0").status == "STOPPED"


def test_nothing_is_confirmed_where_all_diverged(tmp_path):
    oracle = oracle_in(tmp_path, "random", max_trials=2, confirm=True)
    assert len(run_all(oracle, lambda values, n: -math.inf)) == 2


def test_unknown_tuner():
    with pytest.raises(ValueError, match="`tuner` must be one of 'random'"):
        make_oracle("genetic", "val_loss")


def test_a_search_of_no_trials_is_refused():
    """It would never end, because 0 is also no limit."""
    for number in (0, -1, "3"):
        with pytest.raises(ValueError, match="`max_trials` must be a whole number of at least 1"):
            make_oracle("random", "val_loss", number)
