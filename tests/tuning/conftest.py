"""Fixtures of the search tests."""

import csv
import json
import types
from pathlib import Path

import pytest

from keras_gradclip.files import read_csv, write_csv


@pytest.fixture(scope="session")
def recipe():
    """A recipe that trains in a second, for --recipe."""
    return str(Path(__file__).resolve().parent / "search_recipe.py")


@pytest.fixture(scope="session")
def read_trials():
    """Reads the lines of a folder's `trials.csv`, as text."""

    def read(folder):
        with open(folder / "trials.csv", encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    return read


@pytest.fixture(scope="session", autouse=True)
def no_chief():
    """A search in this process is alone, whatever the surroundings say."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TUNER_ID", "ORACLE_IP", "ORACLE_PORT"):
            patch.delenv(f"KERASTUNER_{name}", raising=False)
        yield


@pytest.fixture
def fake_run(monkeypatch):
    """Stands for `recipes.training.run`: writes a history at once, diverges at rates above 1.

    Returns:
        A list of (options, folder, epochs that were there) of the runs.
    """
    from recipes.errors import TrainingDiverged
    from recipes.training.folder import HISTORY

    calls = []

    def run(recipe, options, folder, callbacks):
        folder.mkdir(parents=True, exist_ok=True)
        rows = read_csv(folder / HISTORY) if options.resume else []
        calls.append((options, folder, len(rows)))
        config = {"learning_rate": options.learning_rate, "clip_config": options.clip_config}
        (folder / "config.json").write_text(json.dumps(config))
        model = types.SimpleNamespace(
            stop_training=False, trainable_variables=[], output_shape=(None, 2)
        )
        for epoch in range(len(rows), options.epochs):
            if options.learning_rate > 1:
                raise TrainingDiverged("training diverged to NaN", epoch)
            score = 1 - 1 / (2 + epoch) - options.learning_rate
            rows.append(
                {"epoch": float(epoch), "val_accuracy": score, "clip_fraction": 0.1, "loss": 1.0}
            )
            write_csv(folder / HISTORY, list(rows[0]), rows)
            for callback in callbacks:
                callback.set_model(model)
                callback.on_epoch_end(epoch, dict(rows[-1]))
            if model.stop_training:
                return

    monkeypatch.setattr("tuning.trial.run", run)
    return calls
