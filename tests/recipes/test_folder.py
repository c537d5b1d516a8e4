"""A folder belongs to one run at a time; a start that fails leaves none; names that cannot be."""

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipe import RECIPE

from recipes.errors import RecipeError
from recipes.plugin import files
from recipes.training import Recipe, main
from recipes.training import folder as folders
from recipes.training import options as opts

ROOT = Path(__file__).resolve().parents[2]


def hold(folder, entered):
    """As a run does, in a process of its own."""
    with folders.claimed(Path(folder), resume=False):
        (Path(folder) / folders.CONFIG).write_text("{}")
        entered.set()
        signal.pause()


@pytest.fixture
def held(tmp_path):
    """A folder in which another process is at work."""
    context = multiprocessing.get_context("fork")
    entered = context.Event()
    process = context.Process(target=hold, args=(str(tmp_path / "run"), entered))
    process.start()
    assert entered.wait(60)
    yield tmp_path / "run", process
    process.kill()
    process.join(60)


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_the_folder_is_refused(held, resume):
    folder, _ = held
    with (
        pytest.raises(RecipeError, match="in use by another run"),
        folders.claimed(folder, resume),
    ):
        pytest.fail("two runs in one folder")
    assert (folder / folders.CONFIG).exists()


def test_a_killed_run_leaves_no_lock(held):
    folder, process = held
    process.kill()
    process.join(60)
    with folders.claimed(folder, resume=True):
        assert (folder / folders.CONFIG).exists()
    with pytest.raises(RecipeError, match="holds a run already"), folders.claimed(folder, False):
        pytest.fail("overwritten")


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def flock(*unused):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with folders.claimed(tmp_path / "run", resume=False):
        assert (tmp_path / "run").is_dir()


def test_a_start_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in ((), (folders.CONFIG,)):
        _, folder = folders.open_run(RECIPE, opts.parse(RECIPE, []))
        with pytest.raises(ZeroDivisionError), folders.claimed(folder, False):
            for name in content:
                (folder / name).write_text("{}")
            raise ZeroDivisionError
        assert not list(tmp_path.iterdir())


def test_a_start_interrupted_at_an_import_leaves_no_folder(tmp_path, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["recipes.training.trainer"], "import_tensorflow", interrupted)
    assert main(RECIPE, []) == 130
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_is_no_run(tmp_path):
    (tmp_path / folders.LOCK).touch()
    (tmp_path / ".partial-1-config.json").touch()
    parsed = opts.parse(RECIPE, ["--output", str(tmp_path)])
    assert folders.open_run(RECIPE, parsed)[1] == tmp_path
    (tmp_path / "photo.png").touch()
    with pytest.raises(RecipeError, match="not an empty folder"):
        folders.open_run(RECIPE, parsed)


def test_differences_are_of_names_that_both_have():
    before = {"seed": 0, "epochs": 3, "gone": 1, "same": [1]}
    now = {"seed": 9, "epochs": 4, "new": 2, "same": [1]}
    assert folders.differences(before, now, {"epochs"}) == "seed (0, now 9)"
    assert folders.differences(before, now) == "epochs (3, now 4), seed (0, now 9)"
    assert folders.differences(before, {}) == ""


def test_a_parameter_left_at_its_default_is_an_option_of_the_run(tmp_path):
    saved = opts.parse(RECIPE, ["--clipper", "norm"]).options.saved
    files.write_json(tmp_path / folders.CONFIG, saved)
    resume = ["--resume", "--output", str(tmp_path), "--clipper", "norm", "--max-norm"]
    assert folders.open_run(RECIPE, opts.parse(RECIPE, [*resume, "1"]))[1] == tmp_path
    with pytest.raises(RecipeError, match=r"other values of max_norm \(1.0, now 5.0\)"):
        folders.open_run(RECIPE, opts.parse(RECIPE, [*resume, "5"]))


def test_what_a_run_has_made_stays(tmp_path):
    with pytest.raises(KeyboardInterrupt), folders.claimed(tmp_path / "run", False):
        (tmp_path / "run" / folders.BACKUP).write_bytes(b"")
        raise KeyboardInterrupt
    assert (tmp_path / "run" / folders.BACKUP).exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "x\0", "x" * 4_000])
def test_a_recipe_is_named_as_a_folder_can_be(name):
    with pytest.raises(RecipeError, match="recipe's name"):
        Recipe(name=name)


@pytest.mark.parametrize("name", ["x\0y", "x" * 4_000])
def test_output_that_cannot_be_a_folder(tmp_path, capsys, name):
    assert main(RECIPE, ["--output", str(tmp_path / name)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1_100


@pytest.mark.parametrize("script", ["recipes/vgg16.py", "recipes/tools/zoo.py", "tuning/search.py"])
def test_a_python_without_the_packages_is_told_so_in_one_line(tmp_path, script):
    """Without site packages: what a plain `python` is."""
    ended = subprocess.run(
        [sys.executable, "-S", str(ROOT / script)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("error: no module recipes: run `make venv`")


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(monkeypatch, tmp_path):
    """As by root on a disk that is mounted read-only, where only this call tells."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(RecipeError, match=f"--output .*: {tmp_path} cannot be written"):
        folders.folder_named(str(tmp_path / "new" / "run"))
    assert folders.folder_named(str(tmp_path.parent / "other"))
