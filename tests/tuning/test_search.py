"""Whole searches from the command line, over a recipe that trains in a second."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import keras_gradclip as kgc
from recipes.training.folder import read_history
from tuning.search import main

pytestmark = pytest.mark.usefixtures("blank_pictures")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECIPE = str(HERE / "search_recipe.py")
QUICK = ["--recipe", RECIPE, "--confirm-runs", "0", "--clippers", "absolute"]


def search(folder, *more):
    return main([*QUICK, "--output", str(folder), *more])


def trials_of(folder):
    with open(folder / "trials.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def started(folder, monkeypatch):
    """Where the recipe writes a line for each run that it starts."""
    path = folder / "starts.txt"
    monkeypatch.setenv("STARTS", str(path))
    return lambda: path.read_text().splitlines() if path.exists() else []


def run_apart(folder, *more, **environment):
    """A search in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "tuning/search.py", *QUICK, "--output", str(folder), *more],
        cwd=ROOT,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists() or not path.read_text():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)
    return path.read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A search that nobody interrupts, with its output."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("search") / "whole"
    argv = [*QUICK, "--output", str(folder), "--max-trials", "2"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(argv) == 0
    return folder


def test_a_search_leaves_its_results(finished):
    rows = trials_of(finished)
    assert len(rows) == 2
    assert {row["status"] for row in rows} == {"completed"}
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    (baseline,) = (row for row in rows if row["baseline"] == "True")
    assert baseline["clipper"] == "none" and baseline["absolute/threshold"] == ""
    assert baseline["runs"] == "1" and float(baseline["clip_fraction"]) == 0
    assert float(baseline["lowest"]) <= float(baseline["score"]) <= float(baseline["highest"])
    clipped = [row for row in rows if row["clipper"] == "absolute"]
    assert clipped and all(0.01 <= float(row["absolute/threshold"]) <= 0.1 for row in clipped)
    from PIL import Image

    with Image.open(finished / "search.png") as picture:
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 50  # not an empty page
    assert not list(finished.rglob("*.keras")) and not list(finished.rglob("backup.npz"))


def test_the_runs_are_those_of_the_recipe_with_the_trials_values(finished):
    rows = {row["trial"]: row for row in trials_of(finished)}
    for trial, row in rows.items():
        runs = sorted((finished / "trials" / f"trial_{trial}").glob("run-*"))
        assert len(runs) == float(row["runs"])
        for i, run in enumerate(runs):
            config = json.loads((run / "config.json").read_text())
            assert config["seed"] == i
            assert config["epochs"] == 2 and config["limit_steps"] == 100  # the small budget
            assert config["learning_rate"] == pytest.approx(float(row["learning_rate"]))
            if row["clipper"] == "none":
                assert config["clipper"] == "none" and config["clip_config"] is None
            else:
                threshold = kgc.get(config["clip_config"]).threshold
                assert threshold == pytest.approx(float(row["absolute/threshold"]))
        best = [max(r["val_accuracy"] for r in read_history(run / "history.csv")) for run in runs]
        assert float(row["score"]) == pytest.approx(sum(best) / len(best))


@pytest.mark.parametrize("best", ["absolute", "none"])
def test_best_json_trains_through_the_recipe(finished, tmp_path, best):
    import contextlib

    from keras_gradclip.tuning.hypermodel import as_objective
    from tuning.results import TrialRow, write_best

    (values,) = (json.loads((finished / "best.json").read_text())["values"],)
    if values["clipper"] != best:
        values = {"clipper": best, "absolute/threshold": 0.05}
    row = TrialRow("0", "completed", values, 1.0)
    path = tmp_path / "best.json"
    write_best([row], path, as_objective("val_accuracy"), None, "brightness")
    from search_recipe import RECIPE as recipe

    from recipes.training import main as train

    argv = ["--clip-config", str(path), "--output", str(tmp_path / "run"), "--verbose", "quiet"]
    with contextlib.redirect_stdout(None):
        assert train(recipe, argv) == 0
    fractions = [row["clip_fraction"] for row in read_history(tmp_path / "run" / "history.csv")]
    assert all((fraction > 0) == (best == "absolute") for fraction in fractions)


def test_the_same_command_again_runs_nothing(finished, capsys, tmp_path, monkeypatch):
    starts = started(tmp_path, monkeypatch)
    before = trials_of(finished)
    assert search(finished, "--max-trials", "2") == 0
    assert starts() == []
    assert trials_of(finished) == before
    assert "2 trials are done" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, named",
    [
        (["--threshold-range", "0.01", "1"], "absolute/threshold"),
        (["--clippers", "norm"], "search space: clipper"),
        (["--epochs", "3"], "recipe option epochs"),
        (["--tuner", "grid"], "tuner"),
        (["--objective", "val_loss"], "objective"),
    ],
)
def test_another_search_in_the_same_folder_is_refused(finished, change, named, capsys):
    before = (finished / "search.json").read_text()
    argv = [*QUICK, "--output", str(finished), *change]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert "holds another search" in error and named in error
    assert (finished / "search.json").read_text() == before


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again(tmp_path, monkeypatch):
    """A kill -9 in the second trial: the first is not run again, the second is."""
    monkeypatch.setenv("STARTS", str(tmp_path / "starts.txt"))
    hang, folder = tmp_path / "hang", tmp_path / "search"
    hang.write_text("1")
    process = run_apart(folder, "--max-trials", "2", HANG=str(hang))
    try:
        assert int(wait_for(tmp_path / "hang.taken", process)) == process.pid
    finally:
        process.kill()
        process.communicate(timeout=30)
    (before,) = trials_of(folder)
    assert before["status"] == "completed"

    assert search(folder, "--max-trials", "2") == 0
    after = {row["trial"]: row for row in trials_of(folder)}
    assert [row["status"] for row in after.values()] == ["completed"] * 2
    assert after[before["trial"]]["score"] == before["score"]
    starts = (tmp_path / "starts.txt").read_text().splitlines()
    assert len(starts) == len(set(starts)) == 2  # nobody twice


def test_ctrl_c_is_130_and_goes_on(tmp_path, monkeypatch, capsys, fake_run):
    from tuning.search_run import RecipeTuner

    folder, run_trial = tmp_path / "search", RecipeTuner.run_trial

    def interrupted(self, trial, *args, **kwargs):
        if trial.trial_id == "0001":
            raise KeyboardInterrupt
        return run_trial(self, trial, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RecipeTuner, "run_trial", interrupted)
        assert search(folder, "--max-trials", "2") == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert len(fake_run) == 1
    assert search(folder, "--max-trials", "2") == 0
    assert len(fake_run) == 2
    assert [row["status"] for row in trials_of(folder)] == ["completed"] * 2


def test_diverged_trials_rank_last_and_the_search_goes_on(tmp_path, capsys, fake_run):
    """The baseline and others diverge, more in a row than KerasTuner lets fail."""
    argv = ["--learning-rate", "1e3", "--learning-rate-range", "1e-3", "1e6"]
    assert search(tmp_path / "search", "--max-trials", "12", *argv) == 0
    rows = trials_of(tmp_path / "search")
    assert len(rows) == 12
    status = [row["status"] for row in rows]
    assert status == sorted(status) and status.count("diverged") >= 5  # completed < diverged
    assert all((float(r["learning_rate"]) > 1) == (r["status"] == "diverged") for r in rows)
    assert any(row["baseline"] == "True" for row in rows if row["status"] == "diverged")
    assert "diverged and rank last" in capsys.readouterr().out


def test_confirmation_has_seeds_of_its_own_and_decides(tmp_path, fake_run, capsys):
    folder = tmp_path / "search"
    assert search(folder, "--max-trials", "5", "--confirm-runs", "2") == 0
    rows = trials_of(folder)
    again = [row for row in rows if row["confirms"]]
    assert len(rows) == 7 and rows[:2] == again
    assert [len(row["scores"].split()) for row in again] == [2, 2]
    assert {row["clipper"] for row in again} == {"none", "absolute"}
    for row in again:
        seeds = [o.seed for o, f, _ in fake_run if f.parent.name == f"trial_{row['trial']}"]
        assert seeds == [1, 2]  # the search itself had 0
        original = next(r for r in rows if r["trial"] == row["confirms"])
        assert original["learning_rate"] == row["learning_rate"]
    assert json.loads((folder / "best.json").read_text())["trial"] == again[0]["trial"]
    assert "--confirm-runs 4 or more" in capsys.readouterr().out


def test_max_trials_may_be_raised(tmp_path, fake_run):
    assert search(tmp_path, "--max-trials", "3") == 0
    assert search(tmp_path, "--max-trials", "5") == 0
    assert len(fake_run) == len(trials_of(tmp_path)) == 5


def searched(folder):
    """The names of the hyper-parameters in a search's `search.json`."""
    names = json.loads((folder / "search.json").read_text())
    return [n.split()[2] for n in names if n.startswith("search space: ")]


def test_five_dimensions_by_default_and_a_search_of_six_is_resumed(tmp_path, fake_run, capsys):
    """The exponential clip's β was searched, too, when version 0.2 began."""
    argv = ["--recipe", RECIPE, "--confirm-runs", "0", "--output"]
    assert main([*argv, str(tmp_path / "new"), "--max-trials", "2"]) == 0
    assert len(searched(tmp_path / "new")) == 5
    old = str(tmp_path / "old")
    assert main([*argv, old, "--max-trials", "2", "--beta-range", "0.5", "1"]) == 0
    assert main([*argv, old, "--max-trials", "3"]) == 2
    assert "exponential/beta" in capsys.readouterr().err
    saved = tmp_path / "old" / "search.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"engine": "kerastuner"}))
    assert main([*argv, old, "--max-trials", "3"]) == 0
    assert "exponential/beta" in searched(tmp_path / "old")
    assert len(trials_of(tmp_path / "old")) == 3


def test_an_exception_fails_its_trial_alone(tmp_path, monkeypatch, capsys):
    from recipes.errors import TrainingDiverged

    calls = []

    def run(recipe, options, folder, callbacks):
        calls.append(options)
        folder.mkdir(parents=True)
        if len(calls) % 2:
            raise MemoryError("no memory left")
        raise TrainingDiverged("training diverged to NaN", 0)

    monkeypatch.setattr("tuning.trial.run", run)
    assert search(tmp_path, "--max-trials", "4") == 1
    status = [row["status"] for row in trials_of(tmp_path)]
    assert status == ["diverged", "diverged", "failed", "failed"]
    assert "failed: MemoryError: no memory left" in capsys.readouterr().out


def test_what_is_wrong_with_every_trial_ends_the_search(tmp_path, monkeypatch, capsys):
    from recipes.errors import DataError

    def run(*args):
        raise DataError("no data set 'x'")

    monkeypatch.setattr("tuning.trial.run", run)
    assert search(tmp_path, "--max-trials", "4") == 2
    assert capsys.readouterr().err == "error: no data set 'x'\n"


def test_no_trial_that_ends_well_is_an_error(tmp_path, capsys):
    argv = ["--learning-rate", "1e38", "--fix-learning-rate", "--max-trials", "2"]
    assert search(tmp_path / "search", *argv) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: no trial completed\n"
    assert [row["status"] for row in trials_of(tmp_path / "search")] == ["diverged"] * 2
    assert not (tmp_path / "search" / "best.json").exists()


def check_hyperband(folder):
    """Each later round goes on where its parent stopped."""
    trials = [json.loads(path.read_text()) for path in folder.glob("trials/*/trial.json")]
    later = [t for t in trials if "tuner/trial_id" in t["hyperparameters"]["values"]]
    assert later
    for trial in later:
        values = trial["hyperparameters"]["values"]

        def history(trial_id):
            return read_history(folder / "trials" / f"trial_{trial_id}" / "run-0" / "history.csv")

        parent, own = history(values["tuner/trial_id"]), history(trial["trial_id"])
        assert len(parent) == values["tuner/initial_epoch"]
        assert len(own) == values["tuner/epochs"] > len(parent)
        assert own[: len(parent)] == parent


def test_hyperband_goes_on_from_the_round_before(tmp_path, fake_run):
    argv = ["--tuner", "hyperband", "--epochs", "4", "--confirm-runs", "1"]
    assert search(tmp_path, *argv) == 0
    check_hyperband(tmp_path)
    assert any(before for _, _, before in fake_run)
    confirming = [row for row in trials_of(tmp_path) if row["confirms"]]
    assert [row["epochs"] for row in confirming] == ["4.0", "4.0"]


@pytest.mark.slow
def test_hyperband_with_real_training(tmp_path):
    assert search(tmp_path, "--tuner", "hyperband", "--epochs", "3", "--max-trials", "8") == 0
    check_hyperband(tmp_path)


def test_grid_and_groups(tmp_path, capsys, fake_run):
    argv = ["--tuner", "grid", "--points", "2", "--groups", "--fix-learning-rate"]
    assert search(tmp_path, *argv) == 0
    assert "9 combinations" in capsys.readouterr().out  # 1 + 2³
    rows = [row for row in trials_of(tmp_path) if row["clipper"] == "absolute"]
    names = [f"absolute/threshold/{group}" for group in ("stem", "head", "stages")]
    assert len({tuple(row[name] for name in names) for row in rows}) == 8
    clip = [options.clip_config for options, _, _ in fake_run if options.clip_config]
    assert len(clip) == 8
    assert all(isinstance(kgc.get(config), kgc.ClipMap) for config in clip)


def test_gate(tmp_path, fake_run):
    assert search(tmp_path, "--search-gate", "--max-trials", "6") == 0
    rows = trials_of(tmp_path)
    assert {row["activation_gate"] for row in rows} == {"True", "False"}
    for row in rows:
        assert (row["gate/gamma"] != "") == (row["activation_gate"] == "True")
    gated = [options.activation_gate for options, _, _ in fake_run]
    assert sorted(gated) == sorted(row["activation_gate"] == "True" for row in rows)


@pytest.mark.slow
def test_mirrored(tmp_path):
    argv = ["--devices", "2", "--strategy", "mirrored", "--max-trials", "2"]
    assert search(tmp_path / "search", *argv) == 0
    assert [row["status"] for row in trials_of(tmp_path / "search")] == ["completed"] * 2


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--recipe", "lenet"], "'lenet' is not a recipe: choose from alexnet"),
        (["--recipe", "nowhere.py"], "--recipe nowhere.py: no such file"),
        (["--max-trials", "1"], "--max-trials 1: must be 2 or more"),
        (["--tuner", "genetic"], "invalid choice: 'genetic'"),
        (["--clippers", "agc"], "must be some of none"),
        (["--threshold-range", "1", "0.1"], "must be 0 <= low < high"),
        (["--threshold", "0.1"], "--threshold is searched here: use --threshold-range"),
        (["--clip-config", "x.json"], "x.json: No such file"),
        (["--objective", "steering"], "--direction max or min"),
        (["--learning-rate-range", "1e-9", "1e-8"], "must contain the baseline's learning rate"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--batch-size", "0"], "--batch-size 0: must be 1 or more"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, argv, message, capsys):
    assert main([*QUICK, "--output", str(tmp_path / "x"), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_an_objective_that_is_not_logged_is_named(tmp_path, capsys, fake_run):
    argv = ["--objective", "val_recall", "--direction", "max", "--max-trials", "2"]
    assert search(tmp_path / "x", *argv) == 2
    error = capsys.readouterr().err
    assert "--objective val_recall: not among" in error and "val_accuracy" in error


def test_half_of_kerastuners_variables(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "worker-0")
    assert search(tmp_path / "x") == 2
    assert "KERASTUNER_ORACLE_IP" in capsys.readouterr().err


def test_a_worker_whose_data_are_missing_ends_in_one_line(monkeypatch, capsys, tmp_path):
    import keras_tuner as kt

    from recipes.errors import DataError
    from tuning.search_run import RecipeTuner, Search

    def run(*args):
        raise DataError("no such data")

    def worker(search, oracle):
        """Its loop does what KerasTuner's does."""
        tuner = RecipeTuner.__new__(RecipeTuner)
        vars(tuner).update(vars(search), report=print, get_trial_dir=lambda _: str(tmp_path))
        trial = kt.engine.trial.Trial(kt.HyperParameters())
        trial.hyperparameters.values = {"clipper": "none"}
        return types.SimpleNamespace(search=lambda: tuner.run_trial(trial))

    monkeypatch.setattr("tuning.trial.run", run)
    for name, value in (("TUNER_ID", "worker-0"), ("ORACLE_IP", "x"), ("ORACLE_PORT", "1")):
        monkeypatch.setenv(f"KERASTUNER_{name}", value)
    monkeypatch.setattr(Search, "_tuner", worker)
    assert search(tmp_path) == 2
    assert capsys.readouterr().err == "error: no such data\n"


def test_a_worker_is_silent_when_its_file_stops_changing(tmp_path):
    from tuning.workers import _is_silent

    path, beats = tmp_path / "worker-0.alive", {}
    assert not _is_silent(path, beats, 0.0)  # there is no file yet
    for text in ("", "1"):
        path.write_text(text)
        assert not _is_silent(path, beats, 0.0)
        assert not _is_silent(path, beats, 60.0)
        assert _is_silent(path, beats, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["workers", "variables"])
def test_a_worker_is_killed_and_every_trial_is_accounted_for(launch, tmp_path):
    """Chief and two workers on loopback; kill -9 for the one that runs a trial."""
    import socket

    hang, folder = tmp_path / "hang", tmp_path / "search"
    hang.write_text("0")  # the first worker to start a run hangs in it
    environment = {"HANG": str(hang), "STARTS": str(tmp_path / "starts.txt")}
    processes = []
    try:
        if launch == "workers":
            processes.append(
                run_apart(folder, "--max-trials", "5", "--workers", "2", **environment)
            )
        else:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            for name in ("chief", "worker-0", "worker-1"):
                variables = {
                    "KERASTUNER_ORACLE_IP": "127.0.0.1",
                    "KERASTUNER_ORACLE_PORT": port,
                    "KERASTUNER_TUNER_ID": name,
                }
                more = ["--max-trials", "5", "--worker-timeout", "10"]
                processes.append(run_apart(folder, *more, **environment, **variables))
        victim = int(wait_for(tmp_path / "hang.taken", processes[0]))
        time.sleep(3)  # the other one goes on meanwhile
        os.kill(victim, signal.SIGKILL)
        out, _ = processes[0].communicate(timeout=200)
        assert processes[0].returncode == 0, out
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=30)
    assert "is lost; its trial" in out
    rows = trials_of(folder)
    assert len(rows) == 5 and {row["status"] for row in rows} == {"completed"}
    starts = (tmp_path / "starts.txt").read_text().splitlines()
    assert len(starts) == len(set(starts)) == 5  # the victim died before its own line
    if launch == "variables":
        assert sorted(p.returncode for p in processes) == [-signal.SIGKILL, 0, 0]
