"""Killed in the middle of an epoch and resumed: the same weights, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_recipe import RECIPE

from recipes.training import checkpoint, main
from recipes.training import folder as folders

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


def test_backup_holds_the_states_of_random_layers_and_the_optimizer(whole):
    paths = " ".join(backup_of(whole)["paths"])
    for part in ("seed_generator_state", "momentum", "velocity", "moving_mean", "iteration"):
        assert part in paths


def test_resume_with_another_config_is_refused(whole, capsys):
    argv = ["--resume", "--output", str(whole), "--learning-rate", "0.5", "--seed", "9"]
    assert main(RECIPE, argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --resume: ")
    assert "learning_rate (0.003, now 0.5)" in error
    assert "seed (0, now 9)" in error
    assert "epochs" not in error


def test_resume_with_more_epochs_goes_on(whole, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    argv = ["--resume", "--output", str(folder), "--epochs", "4", "--verbose", "quiet"]
    assert main(RECIPE, argv) == 0
    rows = folders.read_history(folder / folders.HISTORY)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[:3] == folders.read_history(whole / folders.HISTORY)


def test_resume_without_a_run(tmp_path, capsys, monkeypatch):
    assert main(RECIPE, ["--resume", "--output", str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(RECIPE, ["--resume"]) == 2
    assert "no run of tiny in runs/" in capsys.readouterr().err


def test_damaged_backup_is_named(whole, tmp_path, capsys):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / folders.BACKUP).write_bytes(b"not a backup")
    assert main(RECIPE, ["--resume", "--output", str(folder)]) == 2
    assert f"{folder / folders.BACKUP} is not a backup" in capsys.readouterr().err


@pytest.mark.parametrize("first", [0, 1])  # version 0.1 counted from 0
def test_rows_of_unfinished_epochs_are_dropped(tmp_path, first):
    path = tmp_path / "history.csv"
    path.write_text(f"epoch,loss\n{first},1.0\n{first + 1},0.5\n{first + 2},0.2")
    folders.keep_epochs(path, 2)
    assert path.read_text().split() == ["epoch,loss", "1,1.0", "2,0.5"]
    assert folders.read_history(path) == [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5}]
    folders.keep_epochs(path, 0)
    assert not path.exists()
