"""Runs, searches and models that ended well, for cases that then damage them."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
RUN = ["--epochs", "1", "--limit-steps", "2", "--verbose", "quiet"]
SEARCH = [
    *("--recipe", str(TESTS / "tuning" / "search_recipe.py"), "--clippers", "absolute"),
    *("--confirm-runs", "0", "--max-trials", "2", "--epochs", "1", "--limit-steps", "2"),
]


def make_run(folder):
    """An epoch of the tiny recipe, with its backup."""
    from tiny_recipe import RECIPE

    from recipes.training import main

    assert main(RECIPE, [*RUN, "--keep-backup", "--output", str(folder)]) == 0


def make_search(folder):
    """Two trials."""
    from tuning.search import main

    assert main([*SEARCH, "--output", str(folder)]) == 0


def make_monitored(folder):
    """What `ClipMonitor` writes."""
    from run_files import CLIPPED, write_run

    write_run(folder, [{"conv1": CLIPPED}] * 3)


def make_models(folder):
    """A model compiled without a clipper."""
    import keras

    folder.mkdir()
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="head")])
    model.compile("sgd", "mse")
    model.save(folder / "plain.keras")


MAKERS = {
    "run": make_run,
    "search": make_search,
    "monitored": make_monitored,
    "models": make_models,
}
