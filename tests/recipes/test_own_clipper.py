"""A clipper that a user writes is found everywhere, with no other edit."""

import json
import sys

import keras_tuner as kt
import numpy as np
import pytest
from tiny_recipe import RECIPE

import keras_gradclip as kgc
from keras_gradclip.clippers import cards
from keras_gradclip.clippers.base import ALIASES
from keras_gradclip.tuning.space import clip_hyperparameters, to_clipper
from recipes.errors import RecipeError
from recipes.tools import compare
from recipes.training import options as opts

MODULE = '''
import dataclasses
from typing import Any, ClassVar
import keras_gradclip as kgc
from keras_gradclip.clippers import Card

@kgc.register("toy")
@dataclasses.dataclass(frozen=True)
class ToyClip(kgc.AbsoluteClip):
    """Toy clipping: elements under a ceiling.

    Nothing else.
    """

    ceiling: float = kgc.parameter(0.5, help="height of the roof", range=(0.1, 0.9))
    epochs: int = kgc.parameter(3, help="not the recipe's")
    card: ClassVar = Card("bounds elements", "in tests", "0.5", "nobody")
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A module `toy_clipper` in the working folder."""
    (tmp_path / "toy_clipper.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield ["--import", "toy_clipper"]
    ALIASES.pop("toy", None)
    sys.modules.pop("toy_clipper", None)


def test_flags_help_config_compare_search_calibration_and_docs(toy, tmp_path, capsys):
    with pytest.raises(RecipeError, match="invalid choice: 'toy'"):
        opts.parse(RECIPE, ["--clipper", "toy"])
    flags = [*toy, "--clipper", "toy", "--ceiling", "0.3", "--toy-epochs", "2", "--epochs", "5"]
    options = opts.parse(RECIPE, flags).options
    assert (options.clipping, options.epochs) == ({"ceiling": 0.3, "epochs": 2}, 5)
    assert ALIASES["toy"](**options.clipping).ceiling == 0.3
    saved = json.dumps(options.saved)
    (tmp_path / "config.json").write_text(saved)
    assert opts.parse(RECIPE, ["--config", str(tmp_path / "config.json")]).options == options

    with pytest.raises(SystemExit):
        opts.parse(RECIPE, [*toy, "--clipper", "toy", "--help"])
    section = capsys.readouterr().out.partition("--clipper toy:")[2]
    assert "Toy clipping: elements under a ceiling." in section
    assert "height of the roof (default: 0.5; useful: 0.1 to 0.9)" in " ".join(section.split())

    assert compare.clipper_values(RECIPE, "toy:ceiling=0.2") == {"clipper": "toy", "ceiling": 0.2}

    hp = kt.HyperParameters()
    values = clip_hyperparameters(hp, ["toy"], ceiling=(0.2, 0.4))
    assert "toy/ceiling" in values and {p.name for p in hp.space} >= {"toy/ceiling"}
    assert to_clipper(values).ceiling == pytest.approx(0.3)

    samples = {kind: np.ones((4, 1)) for kind in ("norm", "absolute", "toy")}
    watched = kgc.Calibration(
        ["dense"], {"dense": ["kernel"]}, {**samples, "global": np.ones(4)}, percentile=50
    )
    assert watched.clipper("toy", "dense").threshold == 1.0

    assert "| `ToyClip(threshold)` | `toy` | bounds elements | in tests | 0.5 | nobody |" in (
        cards.table()
    )


def test_a_module_that_cannot_be_imported(toy):
    with pytest.raises(RecipeError, match=r"--import no_such_module: ModuleNotFoundError"):
        opts.parse(RECIPE, ["--import", "no_such_module"])
