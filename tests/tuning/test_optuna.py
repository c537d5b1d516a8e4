"""Optuna: the same space, and studies that outlive their processes."""

import multiprocessing
import os
import signal
import time

import keras_tuner as kt
import optuna
import pytest

from keras_gradclip.tuning import suggest, to_clipper
from keras_gradclip.tuning.optuna_space import grid
from keras_gradclip.tuning.oracles import combinations
from keras_gradclip.tuning.space import clip_hyperparameters
from tuning.optuna_engine import OptunaEngine
from tuning.search import main

SPACE = {"learning_rate": (1e-4, 1e-2), "activation_gate": True, "scope": ("layer", "global")}


def test_a_trial_suggests_what_kerastuner_declares():
    """The same names, ranges and choices, and none that the trial does not use."""
    hp = kt.HyperParameters()
    clip_hyperparameters(hp, **SPACE)
    declared = {parameter.name: parameter for parameter in hp.space}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    study.optimize(lambda trial: len(suggest(trial, **SPACE)), n_trials=60)
    seen = set()
    for trial in study.trials:
        assert len(trial.params) == trial.value
        for name, distribution in trial.distributions.items():
            family = name.partition("/")[0]
            assert family in ("clipper", "learning_rate", "activation_gate", "gate") or (
                family == trial.params["clipper"]
            )
            config = declared[name].get_config()
            if isinstance(distribution, optuna.distributions.FloatDistribution):
                assert (distribution.low, distribution.high) == (
                    config["min_value"], config["max_value"]
                )  # fmt: skip
                assert distribution.log == (config["sampling"] == "log")
            elif "values" in config:
                assert list(distribution.choices) == config["values"]
            seen.add(name)
        assert (to_clipper(trial.params) is None) == (trial.params["clipper"] == "none")
    assert seen == set(declared)


def test_a_grid_is_kerastuners():
    space = {"clippers": ["none", "absolute"], "points": 3, "rescale": ("none", "norm")}
    hp = kt.HyperParameters()
    clip_hyperparameters(hp, **space)

    def as_set(values):
        return {tuple(sorted(combination.items())) for combination in values}

    assert as_set(grid(**space)) == as_set(combinations(hp)) and len(grid(**space)) == 7


@pytest.mark.parametrize("space", [{"clippers": ["clipvalue"]}, {"threshold": (0.1, 0.01)}])
def test_wrong_spaces_are_refused(space):
    with pytest.raises(ValueError, match="clip_hyperparameters"):
        suggest(optuna.create_study().ask(), **space)


def search(recipe, folder, *more):
    return main(["--recipe", recipe, "--engine", "optuna", "--output", str(folder), *more])


@pytest.mark.parametrize("tuner", ["hyperband", "grid"])
def test_every_tuner_gives_the_same_files(tuner, tmp_path, fake_run, recipe, read_trials, capsys):
    # Which trials Hyperband ends early follows from the study's name, and that from the folder's.
    folder = tmp_path / "fast"
    argv = ["--tuner", tuner, "--max-trials", "5", "--clippers", "absolute", "--points", "2"]
    argv += ["--confirm-runs", "4", "--epochs", "3"]
    assert search(recipe, folder, *argv) == 0
    rows = read_trials(folder)
    again = [row for row in rows if row["confirms"]]
    own = [row for row in rows if not row["confirms"]]
    assert rows[:2] == again and {row["clipper"] for row in again} == {"none", "absolute"}
    assert [row["runs"] for row in again] == ["4", "4"]
    (baseline,) = (row for row in own if row["baseline"] == "True")
    assert baseline["clipper"] == "none" and len(own) == 5
    if tuner == "hyperband":
        assert {row["status"] for row in own} == {"completed", "pruned"}
    for name in ("best.json", "search.png"):
        assert (folder / name).exists()
    out = capsys.readouterr().out
    assert "rank test over seeds: p = " in out and "train with it: python" in out

    runs = len(fake_run)
    assert search(recipe, folder, *argv) == 0  # and again: nothing is left to do
    assert len(fake_run) == runs
    assert read_trials(folder) == rows


def test_ctrl_c_loses_no_trial(tmp_path, fake_run, recipe, read_trials, monkeypatch, capsys):
    argv = ["--max-trials", "3", "--confirm-runs", "0"]
    train = OptunaEngine._train

    def interrupted(self, trial):
        if trial.number == 1:
            raise KeyboardInterrupt
        return train(self, trial)

    with monkeypatch.context() as patch:
        patch.setattr(OptunaEngine, "_train", interrupted)
        assert search(recipe, tmp_path, *argv) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert search(recipe, tmp_path, *argv) == 0
    rows = read_trials(tmp_path)
    assert sorted(row["trial"] for row in rows) == ["0000", "0001", "0003"]  # 2 runs 1 again
    assert {row["status"] for row in rows} == {"completed"} and len(fake_run) == 3


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--objective", "steering"], "Say --direction max or min"),
        (["--clippers", "agc"], "`clippers` must be some of"),
        (["--join"], "no search runs here to --join"),
        (["--engine", "kerastuner", "--join"], "are for --engine optuna"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, argv, message, capsys, recipe):
    assert search(recipe, tmp_path / "x", *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def _study(url):
    storage = optuna.storages.RDBStorage(
        url,
        heartbeat_interval=1,
        grace_period=2,
        heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(2),
    )
    return optuna.create_study(storage=storage, study_name="s", load_if_exists=True)


def _hang(url, flag):
    def objective(trial):
        suggest(trial, **SPACE)
        flag.touch()
        time.sleep(600)

    _study(url).optimize(objective, n_trials=1)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_trial_of_a_process_that_is_killed_goes_to_the_next(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    study = _study(url)
    process = multiprocessing.get_context("fork").Process(
        target=_hang, args=(url, tmp_path / "flag"), daemon=True
    )
    process.start()
    while not (tmp_path / "flag").exists():
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (lost,) = study.trials
    assert lost.state.name == "RUNNING" and lost.params
    seen = []

    def objective(trial):
        seen.append(suggest(trial, **SPACE))
        return float(len(seen))

    for _ in range(20):
        time.sleep(0.5)
        study.optimize(objective, n_trials=1)
        if lost.params in seen:
            break
    assert lost.params in seen
    assert study.trials[0].state.name == "FAIL"
