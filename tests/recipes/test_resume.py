"""Killed in the middle of an epoch and resumed: the same weights, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from tiny_recipe import RECIPE

from recipes.training import checkpoint, main, run
from recipes.training import folder as folders

pytestmark = pytest.mark.usefixtures("blank_pictures")

ROOT = Path(__file__).resolve().parents[2]
# Eight steps an epoch, a backup every three: killed at step 13, the last backup is of step 12.
KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {here!r}]
import keras
from tiny_recipe import RECIPE
from recipes.training import run

class Kill(keras.callbacks.Callback):
    steps = 0
    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps == 13:
            os.kill(os.getpid(), signal.SIGKILL)

run(RECIPE, RECIPE.options(backup_every=3, verbose="quiet"), {folder!r}, callbacks=[Kill()])
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(RECIPE, ["--output", str(folder), "--verbose", "quiet", "--keep-backup"]) == 0
    return folder


def backup_of(folder):
    return checkpoint.load_backup(folder / folders.BACKUP)


def test_killed_and_resumed_equals_uninterrupted(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    code = KILLED.format(root=str(ROOT), here=str(Path(__file__).parent), folder=str(folder))
    ended = subprocess.run(
        [sys.executable, "-c", code], timeout=200, env={**os.environ}, capture_output=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert backup_of(folder)["step"] == 12

    argv = ["--resume", "--output", str(folder), "--verbose", "quiet", "--keep-backup"]
    assert main(RECIPE, argv) == 0

    expected, got = backup_of(whole), backup_of(folder)
    assert got["step"] == expected["step"] == 24
    for path, a, b in zip(expected["paths"], expected["values"], got["values"], strict=True):
        assert np.array_equal(a, b), path
    # The metrics of the epoch that was cut are whole as well.
    assert folders.read_history(folder / folders.HISTORY) == folders.read_history(
        whole / folders.HISTORY
    )
    assert folders.read_history(folder / folders.LAYERS) == folders.read_history(
        whole / folders.LAYERS
    )
    out = capsys.readouterr().out
    assert "Best accuracy: " in out


def test_an_epoch_that_is_begun_again_has_its_own_metrics(whole, tmp_path):
    """The last backup is of the end of the epoch before, with the metrics of that."""

    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.model.optimizer.iterations == 9:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(RECIPE, RECIPE.options(verbose="quiet"), tmp_path / "run", callbacks=[Interrupt()])
    assert backup_of(tmp_path / "run")["step"] == 8
    run(RECIPE, RECIPE.options(verbose="quiet", resume=True), tmp_path / "run")
    for name in (folders.HISTORY, folders.LAYERS):
        rows, expected = (folders.read_history(f / name) for f in (tmp_path / "run", whole))
        assert rows == expected


def test_a_history_that_lacks_epochs_of_the_backup_is_named(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / folders.HISTORY).unlink()
    assert main(RECIPE, ["--resume", "--output", str(folder), "--epochs", "4"]) == 2
    assert "history.csv: has 0 rows for the 3 epochs of backup.npz" in capsys.readouterr().err
    assert not (folder / folders.HISTORY).exists()


def test_backup_holds_the_states_of_random_layers_and_the_optimizer(whole):
    paths = " ".join(backup_of(whole)["paths"])
    for part in ("seed_generator_state", "momentum", "velocity", "moving_mean", "iteration"):
        assert part in paths


def test_resume_with_another_config_is_refused(whole, capsys):
    argv = ["--resume", "--output", str(whole), "--learning-rate", "0.5", "--seed", "9"]
    argv += ["--gate-gamma", "0.1"]  # of a run that may have a gate
    assert main(RECIPE, argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --resume: ")
    assert "learning_rate (0.003, now 0.5)" in error
    assert "seed (0, now 9)" in error
    assert "gate_gamma (None, now 0.1)" in error
    assert "epochs" not in error


def test_resume_with_more_epochs_goes_on(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    argv = ["--resume", "--output", str(folder), "--epochs", "4", "--verbose", "quiet"]
    assert main(RECIPE, argv) == 0
    rows = folders.read_history(folder / folders.HISTORY)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[:3] == folders.read_history(whole / folders.HISTORY)


def test_an_interrupted_run_does_not_end_before_where_it_is(whole, tmp_path, capsys):
    """Its end would delete the backup, and with it the epochs beyond."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / folders.RESULT).unlink()
    files = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert main(RECIPE, ["--resume", "--output", str(folder), "--epochs", "2"]) == 2
    assert "--epochs 2: the run in" in capsys.readouterr().err
    assert files == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_run_of_version_0_1_goes_on_and_is_finished(whole, tmp_path, capsys):
    """Its history has no clip_fraction and no gradient norm; those of later epochs are averaged."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    new = ("clip_fraction", "grad_norm")
    rows = folders.read_history(whole / folders.HISTORY)
    old = [{k: v for k, v in row.items() if k not in new} for row in rows]
    folders.write_table(folder / folders.HISTORY, old)
    argv = ["--resume", "--output", str(folder), "--epochs", "4", "--verbose", "quiet"]
    assert main(RECIPE, argv) == 0
    rows = folders.read_history(folder / folders.HISTORY)
    assert ["clip_fraction" in row for row in rows] == [False, False, False, True]
    assert main(RECIPE, argv) == 0  # reads the empty cells
    assert f"{100 * rows[-1]['clip_fraction']:.3g} % (mean" in capsys.readouterr().out


def test_resume_without_a_run(tmp_path, capsys, monkeypatch):
    assert main(RECIPE, ["--resume", "--output", str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(RECIPE, ["--resume"]) == 2
    assert "no run of tiny in runs/" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["text", "cut", "of another network"])
def test_damaged_backup_is_named(whole, tmp_path, capsys, damage):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    backup = folder / folders.BACKUP
    line = f"error: {backup} is not a backup"
    if damage == "text":
        backup.write_bytes(b"not a backup")
    elif damage == "cut":
        backup.write_bytes(backup.read_bytes()[:-200])
    else:
        checkpoint.save_backup(backup, foreign_model(), 12, 0.0)
        line = "it belongs to another network or optimizer"
    before = backup.read_bytes(), (folder / folders.HISTORY).read_bytes()
    assert main(RECIPE, ["--resume", "--output", str(folder), "--verbose", "quiet"]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert (backup.read_bytes(), (folder / folders.HISTORY).read_bytes()) == before


def foreign_model():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_twenty_times_at_any_moment(whole, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, str(Path(__file__).parent / "tiny_recipe.py"), "--output"]
    command += [str(folder), "--verbose", "quiet", "--keep-backup", "--backup-every", "1"]
    rng = np.random.default_rng(0)
    kills, begun = 0, time.monotonic()
    while True:
        resume = ["--resume"] if (folder / folders.CONFIG).exists() else []
        process = subprocess.Popen([*command, *resume], stderr=subprocess.PIPE)
        # From its imports to its last step; a start takes about as long as the training.
        patience = rng.uniform(1, 30) if kills < 20 else None
        try:
            _, error = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, error.decode()
        if kills >= 20 or time.monotonic() - begun > 1800:
            break
        shutil.rmtree(folder)  # finished too soon: once more from the start
    expected, got = backup_of(whole), backup_of(folder)
    assert got["step"] == expected["step"] and kills >= 10
    for path, a, b in zip(expected["paths"], expected["values"], got["values"], strict=True):
        assert np.array_equal(a, b), path
    assert folders.read_history(folder / folders.HISTORY) == folders.read_history(
        whole / folders.HISTORY
    )
    assert not list(folder.glob(".partial*"))


@pytest.mark.parametrize("first", [0, 1])  # version 0.1 counted from 0
def test_rows_of_unfinished_epochs_are_dropped(tmp_path, first):
    path = tmp_path / "history.csv"
    path.write_text(f"epoch,loss\n{first},1.0\n{first + 1},0.5\n{first + 2},0.2")
    rows = folders.read_history(path, ["loss"], 2)
    assert rows == [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5}]
    folders.write_table(path, [*rows, {"epoch": 3.0, "loss": 0.25, "skipped": 1.0}])
    assert path.read_text().split() == ["epoch,loss,skipped", "1,1.0,", "2,0.5,", "3,0.25,1"]
    assert folders.read_history(path, ["loss"], 0) == []
    assert folders.read_history(tmp_path / "none.csv", ["loss"], 2) == []


def test_the_states_of_stateful_layers_are_in_a_backup(tmp_path):
    inputs = keras.Input((5, 4), batch_size=8)
    rnn = keras.layers.Bidirectional(keras.layers.LSTM(4, stateful=True))
    model = keras.Model(inputs, keras.layers.Dense(1)(rnn(inputs)))
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(8, 5, 4)).astype("float32")
    model.fit(x, x[:, 0, :1], batch_size=8, verbose=0)
    states = [*rnn.forward_layer.states, *rnn.backward_layer.states]
    before = [state.numpy() for state in states]
    assert all(value.any() for value in before)
    checkpoint.save_backup(tmp_path / "backup.npz", model, 1, 0.0)
    model.fit(x, x[:, 0, :1], batch_size=8, verbose=0)
    checkpoint.restore(model, checkpoint.load_backup(tmp_path / "backup.npz"))
    np.testing.assert_array_equal([state.numpy() for state in states], before)
