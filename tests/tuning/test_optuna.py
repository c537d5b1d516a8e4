"""`suggest`: KerasTuner's space for Optuna, and studies that outlive their processes."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras_tuner as kt
import pytest

from keras_gradclip.tuning import to_clipper
from keras_gradclip.tuning.space import clip_hyperparameters

optuna = pytest.importorskip("optuna")
from keras_gradclip.tuning import suggest  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "optuna.md"
SPACE = {"learning_rate": (1e-4, 1e-2), "activation_gate": True, "scope": ("layer", "global")}


def test_what_is_no_trial_is_refused():
    for other in (None, optuna.create_study(), kt.HyperParameters()):
        with pytest.raises(ValueError, match=r"suggest: `trial` must be an optuna\.Trial"):
            suggest(other)


@pytest.mark.slow
def test_a_study_needs_no_scipy():
    """The extra `optuna` does not bring it."""
    code = (
        "import sys; sys.modules['scipy'] = None; import optuna; "
        "from keras_gradclip.tuning import suggest, to_clipper; study = optuna.create_study(); "
        "study.optimize(lambda t: bool(to_clipper(suggest(t))), n_trials=15); "
        "print(len(study.trials), 'scipy' in sys.modules and sys.modules['scipy'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "15 None", done.stderr[-2000:]


def test_a_trial_suggests_what_kerastuner_declares():
    """The same names, ranges and choices, and none that the trial does not use."""
    hp = kt.HyperParameters()
    clip_hyperparameters(hp, **SPACE)
    declared = {parameter.name: parameter for parameter in hp.space}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    study.optimize(lambda trial: len(suggest(trial, **SPACE)), n_trials=60)
    seen = set()
    for trial in study.trials:
        assert len(trial.params) == trial.value
        for name, distribution in trial.distributions.items():
            family = name.partition("/")[0]
            assert family in ("clipper", "learning_rate", "activation_gate", "gate") or (
                family == trial.params["clipper"]
            )
            config = declared[name].get_config()
            if isinstance(distribution, optuna.distributions.FloatDistribution):
                assert (distribution.low, distribution.high) == (
                    config["min_value"], config["max_value"]
                )  # fmt: skip
                assert distribution.log == (config["sampling"] == "log")
            elif "values" in config:
                assert list(distribution.choices) == config["values"]
            seen.add(name)
        assert (to_clipper(trial.params) is None) == (trial.params["clipper"] == "none")
    assert seen == set(declared)


@pytest.mark.parametrize("space", [{"clippers": ["clipvalue"]}, {"threshold": (0.1, 0.01)}])
def test_wrong_spaces_are_refused(space):
    with pytest.raises(ValueError, match="clip_hyperparameters"):
        suggest(optuna.create_study().ask(), **space)


def _study(url):
    storage = optuna.storages.RDBStorage(
        url,
        heartbeat_interval=1,
        grace_period=2,
        heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(2),
    )
    return optuna.create_study(storage=storage, study_name="s", load_if_exists=True)


def _hang(url, flag):
    def objective(trial):
        suggest(trial, **SPACE)
        flag.touch()
        time.sleep(600)

    _study(url).optimize(objective, n_trials=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_trial_of_a_process_that_is_killed_goes_to_the_next(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    study = _study(url)
    process = multiprocessing.get_context("fork").Process(
        target=_hang, args=(url, tmp_path / "flag"), daemon=True
    )
    process.start()
    while not (tmp_path / "flag").exists():
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (lost,) = study.trials
    assert lost.state.name == "RUNNING" and lost.params
    seen = []

    def objective(trial):
        seen.append(suggest(trial, **SPACE))
        return float(len(seen))

    for _ in range(20):
        time.sleep(0.5)
        study.optimize(objective, n_trials=1)
        if lost.params in seen:
            break
    assert lost.params in seen
    assert study.trials[0].state.name == "FAIL"


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_program_of_the_page_goes_on_with_its_study(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for _ in range(2):  # a second process of the study, or the same one again
        names = {"__name__": "example"}
        exec(compile(block, str(PAGE), "exec"), names)
        assert "->" in capsys.readouterr().out.splitlines()[-1]
    assert names["study"].trials[0].params["clipper"] == "none"
    assert (
        len(names["study"].trials) == 5
    )  # the first 4, and the one after which it sees that they are done
