"""The wheel and the source distribution install and work without a checkout."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SMOKE = """
import sys
import keras, numpy as np
import keras_gradclip as kgc
assert "site-packages" in kgc.__file__, kgc.__file__
assert not {"keras_tuner", "matplotlib"} & set(sys.modules), "import loads too much"
x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
model.compile(kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), kgc.AbsoluteClip(1e-3)), "mse")
before = model.get_weights()[0].copy()
model.fit(x, 100 * x.sum(axis=1, keepdims=True), batch_size=64, verbose=0)
assert np.abs(model.get_weights()[0] - before).max() < 1.01e-3
model.save("model.keras")
keras.models.load_model("model.keras")
print(kgc.__version__)
"""


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_a_distribution_installs_in_an_empty_environment(kind, tmp_path):
    """Both from one command; the source distribution is built into a wheel on the way."""
    source = tmp_path / "source"
    run("git", "clone", "--quiet", str(ROOT), str(source))
    run(sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(source))
    (archive,) = (tmp_path / "dist").glob(kind)
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    pins = str(ROOT / "constraints.txt")
    # With the checkout on PYTHONPATH, pip would find the plugin installed, and leave it at that.
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run(str(python), "-m", "pip", "install", "-q", "-c", pins, f"{archive}[tensorflow]", env=clean)
    shown = run(str(python), "-c", SMOKE, cwd=tmp_path, env=clean).splitlines()[-1]
    assert shown in archive.name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_editable_install_runs_the_recipes_from_any_folder(tmp_path):
    """Without dependencies: only the location matters here."""
    source = tmp_path / "source"
    run("git", "clone", "--quiet", str(ROOT), str(source))
    venv.create(tmp_path / "own", with_pip=True)
    python = str(tmp_path / "own" / "bin" / "python")
    run(python, "-m", "pip", "install", "-q", "--no-deps", "-e", str(source))
    run(python, "-m", "pip", "install", "-q", "filelock")
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for script in ("recipes/resnet50.py", "recipes/tools/cluster.py"):
        shown = run(python, str(source / script), "--help", cwd=tmp_path, env=clean)
        assert f"usage: python {source / script}" in shown or "usage: python recipes" in shown
