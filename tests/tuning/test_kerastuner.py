"""What this package leans on in KerasTuner, and that nobody else does."""

import ast
from pathlib import Path

import keras_tuner as kt
import pytest

from keras_gradclip.tuning import _kerastuner
from keras_gradclip.tuning._kerastuner import BaseTuner, mark_for_reload
from keras_gradclip.tuning.oracles import make_oracle

ROOT = Path(__file__).resolve().parents[2]
#: The private names of `keras_tuner.Oracle` that `_kerastuner` uses, each with its use.
REASONS = {
    "ongoing_trials": "which worker runs which trial: a lost worker's trial is reassigned",
    "tuner_ids": "the workers that the chief waits for at the end: lost ones are removed",
    "_retry_queue": "the trials that the next worker gets",
    "start_order": "Hyperband and the Bayesian search read it: completed after a kill",
    "end_order": "the trials that are over: completed after a kill; no trial ends twice",
    "_get_trial_dir": "the path of `trial.json`, to write it atomically",
    "_get_oracle_fname": "the path of `oracle.json`, to write it atomically",
    "_save_trial": "overridden: KerasTuner writes in place, where a kill tears the file",
}


def missing_names() -> dict[str, str]:
    """The private names that the installed KerasTuner lacks, each with its use."""
    oracle = kt.oracles.RandomSearchOracle("val_loss", 1)
    missing = {name: why for name, why in REASONS.items() if not hasattr(oracle, name)}
    tuner = {
        "_get_tuner_fname": "a tuner reloads where it finds this file",
        "_run_and_update_trial": "overridden: reports each run of a trial",
    }
    return missing | {name: why for name, why in tuner.items() if not hasattr(BaseTuner, name)}


def test_kerastuner_has_the_private_names_that_are_used():
    missing = missing_names()
    assert not missing, f"KerasTuner {kt.__version__} has changed; see _kerastuner.py: {missing}"


def test_a_change_of_kerastuner_is_noticed(monkeypatch):
    monkeypatch.delattr(kt.Oracle, "_get_trial_dir")
    assert list(missing_names()) == ["_get_trial_dir"]


class Tuner(BaseTuner):
    def __init__(self, folder, **options):
        oracle = make_oracle("random", "val_loss", 3, hyperparameters=kt.HyperParameters())
        super().__init__(oracle, directory=str(folder), project_name="trials", **options)

    def run_trial(self, trial):
        raise KeyboardInterrupt


def test_a_search_that_was_killed_in_its_first_trial_is_reloaded(tmp_path):
    """KerasTuner's own would begin anew: it writes its tuner's file at the end of a trial."""
    first = Tuner(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        first.search()
    assert not Tuner(tmp_path).oracle.trials
    mark_for_reload(tmp_path / "trials")
    assert list(Tuner(tmp_path).oracle.trials) == list(first.oracle.trials)


@pytest.mark.parametrize("file", ["oracle.json", "trial_0000/trial.json"])
def test_a_damaged_file_is_named(file, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Tuner(tmp_path).search()
    path = tmp_path / "trials" / next(iter((tmp_path / "trials").glob(file.replace("0000", "*"))))
    path.write_text("{\n")
    with pytest.raises(ValueError, match=f"{path.name}, line 2: not JSON"):
        mark_for_reload(tmp_path / "trials")


def test_nobody_else_uses_them():
    files = [*(ROOT / "keras_gradclip").rglob("*.py"), *(ROOT / "tuning").glob("*.py")]
    assert len(files) > 20
    for path in files:
        if path.name == Path(_kerastuner.__file__).name:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("keras_tuner."), path
            if isinstance(node, ast.Attribute):
                assert node.attr not in REASONS, f"{path}:{node.lineno}"
