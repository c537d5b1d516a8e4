"""Searches that are killed, that meet a full disk or another search, and broken inputs."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from tuning.search import main

pytestmark = pytest.mark.usefixtures("blank_pictures")

ROOT = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing is cleaned up after it."""


@pytest.fixture
def search(recipe, tmp_path):
    def run(*more, folder=tmp_path / "search"):
        argv = ["--recipe", recipe, "--clippers", "absolute", "--confirm-runs", "0"]
        return main([*argv, "--output", str(folder), "--max-trials", "3", *more])

    run.folder = tmp_path / "search"
    return run


def check(folder, read_trials, trials=3):
    """Everything is there, whole, and once."""
    rows = read_trials(folder)
    assert len(rows) == trials and {row["status"] for row in rows} == {"completed"}
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())
    assert (folder / "search.png").read_bytes().endswith(b"IEND\xaeB`\x82")


@pytest.mark.pictures
def test_killed_at_any_write(search, fake_run, read_trials, monkeypatch):
    """Each start dies at a later one of its files than the start before."""
    replace, left = os.replace, [0]

    def replace_or_die(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_die)
        for writes in (0, 1, 2, 4):
            left[0] = writes
            with pytest.raises(Killed):
                search("--worker-timeout", "2")
    assert search("--worker-timeout", "2") == 0
    check(search.folder, read_trials)


@pytest.mark.pictures
def test_a_full_disk_is_one_line_and_goes_on_after_it(
    search, fake_run, read_trials, monkeypatch, capsys
):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert search() == 1
    assert capsys.readouterr().err == "error: No space left on device\n"
    assert search() == 0
    check(search.folder, read_trials)


def test_a_second_search_in_a_folder_is_refused(search, fake_run, capsys):
    search.folder.mkdir()
    with FileLock(search.folder / ".lock"):
        assert search() == 2
    error = capsys.readouterr().err
    assert "in use by another search" in error and error.count("\n") == 1
    assert not fake_run
    assert search() == 0


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("search.json", "{", "search.json, line 1: not JSON"),
        ("search.json", "[]", "is not the file of a search"),
        (
            "search.json",
            '{"engine": "", "search space: exponential/beta": {}}',
            "is not the file of a search",
        ),
        ("search.json", "\0", "search.json, line 1: not JSON"),
        ("trials/oracle.json", "{}", "Error reloading `Oracle`"),
        ("trials/oracle.json", "", "oracle.json, line 1: not JSON"),
        ("trials/trial_0000/trial.json", "[1", "trial.json, line 1: not JSON"),
    ],
)
def test_a_damaged_search_is_one_line_and_stays(name, content, message, search, fake_run, capsys):
    assert search() == 0
    capsys.readouterr()
    (search.folder / name).write_text(content)
    before = {path: path.read_bytes() for path in search.folder.rglob("*.json")}
    assert search("--max-trials", "4") in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert {path: path.read_bytes() for path in search.folder.rglob("*.json")} == before


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--output", "a\0b"], "a NUL character cannot be in a name"),
        (["--output", "x" * 4000], "File name too long"),
        (["--recipe", "../../nowhere.py"], "no such file"),
        (["--recipe", "a\0.py"], "no such file"),
        (["--calibration", "nowhere.json"], "nowhere.json"),
        (["--learning-rate-range", "nan", "1"], "must be 0 <= low < high, but is nan to 1"),
        (["--threshold-range", "nan", "1"], "must be 0 <= low < high"),
        (["--worker-timeout", "x"], "invalid float value"),
    ],
)
def test_broken_flags_are_one_line(argv, message, search, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert search(*argv) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, message",
    [
        ("RECIPE = (", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("", "defines no RECIPE"),
        ("RECIPE = 3", "is not a Recipe"),
    ],
)
def test_a_broken_recipe_file_is_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "broken_recipe.py"
    path.write_text(text)
    assert main(["--recipe", str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_moments(tmp_path, recipe, read_trials):
    """SIGKILL, twenty times; then the search goes to its end."""
    rng = random.Random(0)
    folder = tmp_path / "search"
    argv = ["--recipe", recipe, "--clippers", "absolute", "--confirm-runs", "2"]
    argv += ["--output", str(folder), "--max-trials", "6"]
    command = [sys.executable, "tuning/search.py", *argv, "--worker-timeout", "4"]
    environment = {**os.environ, "STARTS": str(tmp_path / "starts.txt")}
    for _ in range(20):
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        process.stdout.readline()  # until it has said what it searches
        time.sleep(rng.uniform(0, 4))
        ended = process.poll()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if ended is not None:
            assert ended == 0
            break
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(folder, read_trials, trials=8)
    own = [row for row in read_trials(folder) if not row["confirms"]]
    assert len({row["learning_rate"] for row in own}) == 6  # none twice
