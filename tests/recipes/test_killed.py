"""SIGKILL at random moments, and on with the same command: a calibration, a study, two processes.

The recipe and the search have theirs in test_resume.py and in tuning/test_search_interrupted.py.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from keras_gradclip.files import read_csv
from recipes.training import checkpoint
from recipes.training import folder as folders

HERE = Path(__file__).resolve().parent
KILLS = 20
PATHS = f"import sys; sys.path[:0] = [{str(HERE.parents[1])!r}, {str(HERE)!r}]\n"
CALIBRATION = PATHS + (
    """
from recipes.tools import calibrate
from tiny_recipe import RECIPE
calibrate.find_recipe = lambda name: RECIPE
sys.exit(calibrate.main(["resnet50", "--verbose", "quiet", *sys.argv[1:]]))
"""
)
STUDY = PATHS + (
    """
import numpy as np
import keras_gradclip as kgc
from benchmarks import evidence
rng = np.random.default_rng(0)
x, y = rng.normal(size=(256, 14, 14, 1)).astype("float32"), rng.integers(0, 10, 256)
evidence.load_images = lambda *_: (x, y, x[:50], y[:50])
evidence.PRESETS["small"] = (
    evidence.Study("tiny", "lenet5", "mnist_embedded@14", (evidence.NONE, kgc.UpdateRatioClip()),
                   (0.01, 0.1), (1, 2, 3), 1),
)
sys.exit(evidence.main(["--threads", "1", *sys.argv[1:]]))
"""
)
WORKERS = [str(HERE.parents[1] / "recipes/tools/cluster.py"), "--workers", "2"]
WORKERS += [str(HERE / "tiny_recipe.py"), "--verbose", "quiet"]
WORKERS += ["--backup-every", "3", "--keep-backup"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def start(command, folder):
    """The command, in a process group of its own, with its output where a failure shows it."""
    with open(folder.parent / "output.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, *command, str(folder)],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TF_NUM_INTRAOP_THREADS": "1"},
        )


def to_the_end(command, folder):
    """Seconds until the command has ended well."""
    begun = time.monotonic()
    process = start([*command, "--output"], folder)
    try:
        status = process.wait(timeout=600)
    finally:
        end(process)
    assert status == 0, (folder.parent / "output.log").read_text()[-3000:]
    return time.monotonic() - begun


def end(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def killed(command, folder, seconds, resume=()):
    """Kill it `KILLS` times, up to `seconds` after its start; a run that ended begins anew."""
    rng, kills = np.random.default_rng(0), 0
    while kills < KILLS:
        begun = (folder / folders.CONFIG).exists()
        process = start([*command, *(resume if begun else ()), "--output"], folder)
        # Half of them in the last part, where files are written.
        moment = rng.uniform(*((0.1, 1.0) if kills % 2 else (0.8, 1.0))) * seconds
        try:
            status = process.wait(timeout=moment)
            assert status == 0, (folder.parent / "output.log").read_text()[-3000:]
            shutil.rmtree(folder)
        except subprocess.TimeoutExpired:
            kills += 1
        finally:
            end(process)
            end_workers(folder)
    return (*command, *(resume if (folder / folders.CONFIG).exists() else ()))


def pair_of_folders(path):
    """For a run that nobody interrupts, and for one that is killed."""
    for name in ("whole", "killed"):
        (path / name).mkdir()
    return path / "whole/run", path / "killed/run"


def test_a_calibration(tmp_path):
    whole, folder = pair_of_folders(tmp_path)
    command = ["-c", CALIBRATION]
    seconds = to_the_end(command, whole)
    killed(command, folder, seconds)
    to_the_end(command, folder)
    names = sorted(path.name for path in whole.iterdir())
    left = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".partial-"))
    assert left == names and "clip-norm.json" in names
    for name in names:
        if name.endswith(".json"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_study(tmp_path):
    whole, folder = pair_of_folders(tmp_path)
    command = ["-c", STUDY]
    seconds = to_the_end(command, whole)
    killed(command, folder, seconds / 2)
    to_the_end(command, folder)
    expected, got = (read_csv(run / "evidence.csv", numbers=False) for run in (whole, folder))
    assert len(expected) == 12
    for row in expected + got:
        del row["seconds"]
    assert got == expected


def test_two_processes(tmp_path):
    whole, folder = pair_of_folders(tmp_path)
    seconds = to_the_end(WORKERS, whole)
    command = killed(WORKERS, folder, seconds, resume=["--resume"])
    to_the_end(command, folder)
    expected, got = (checkpoint.load_backup(run / folders.BACKUP) for run in (whole, folder))
    assert got["step"] == expected["step"] == 24
    for path, a, b in zip(expected["paths"], expected["values"], got["values"], strict=True):
        if path.startswith(("conv", "bn", "predictions", "adamw")):
            np.testing.assert_array_equal(a, b, err_msg=path)


def end_workers(folder):
    """Those that the launcher could not end, since it was killed; they would end by themselves."""
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            command = (proc / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in command:
            os.kill(int(proc.name), signal.SIGKILL)
