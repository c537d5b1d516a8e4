"""Recipes over several workers: TF_CONFIG, who computes what, who writes, and lost workers."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tiny_recipe import RECIPE, load_data

from recipes.data import Feed, Split
from recipes.errors import RecipeError
from recipes.tools import cluster
from recipes.training import checkpoint, main
from recipes.training import folder as folders
from recipes.training import multiworker as workers

HERE = Path(__file__).resolve().parent
TWO = {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}


def config(cluster=None, kind="worker", index=0):
    task = {"type": kind, "index": index}
    return json.dumps({"cluster": TWO if cluster is None else cluster, "task": task})


# ------------------------------------------------------------------------------------- TF_CONFIG


def test_workers_in_order():
    found = workers.read_cluster({"TF_CONFIG": config(index=1)})
    assert found.tasks == (("worker 0", "10.0.0.1:2222"), ("worker 1", "10.0.0.2:2222"))
    assert (found.here, found.name, found.is_chief) == (1, "worker 1", False)
    assert workers.read_cluster({"TF_CONFIG": config()}).is_chief


def test_a_chief_comes_first():
    jobs = {"worker": ["b:1", "c:1"], "chief": ["a:1"]}
    found = workers.read_cluster({"TF_CONFIG": config(jobs)})
    assert [name for name, _ in found.tasks] == ["chief", "worker 0", "worker 1"]
    assert not found.is_chief and found.name == "worker 0"
    assert workers.read_cluster({"TF_CONFIG": config(jobs, "chief")}).is_chief


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "TF_CONFIG is not set. Set on each machine"),
        ("{'cluster': {}}", "is not JSON"),
        ("[]", "must be an object with 'cluster'"),
        ('{"cluster": {"worker": ["a:1"]}}', "must be an object with 'task'"),
        (config({}), "names no worker"),
        (config({"worker": "a:1"}), "['cluster']['worker'] must be a list of 'host:port'"),
        (config({"worker": ["a"]}), "the address 'a', which is not 'host:port'"),
        (config({"worker": ["a:99999"]}), "the address 'a:99999'"),
        (config({"worker": ["a:1", "a:1"]}), "gives the address 'a:1' to two workers"),
        (config({"worker": ["a:1"], "ps": ["b:1"]}), "has the job 'ps'"),
        (config({"worker": ["a:1"], "chief": ["b:1", "c:1"]}), "more than one chief"),
        (config(index=2), "['task']['index'] is 2, and must be a whole number from 0 to 1"),
        (config(index="0"), "['task']['index'] is '0'"),
        (config(kind="chief"), "['task']['type'] is 'chief', and must be one of ['worker']"),
    ],
)
def test_what_is_wrong_with_it(text, message, monkeypatch, capsys, tmp_path):
    with pytest.raises(RecipeError) as error:
        workers.read_cluster({"TF_CONFIG": text})
    assert message in str(error.value)
    monkeypatch.setenv("TF_CONFIG", text)
    argv = ["--strategy", "multiworker", "--output", str(tmp_path / "run")]
    assert main(RECIPE, argv) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: --strategy multiworker: ") and message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch-size", "63"], "--batch-size 63 is not divisible by the 2 devices of 2 workers"),
        (["--devices", "3"], "--devices 3: worker 0 has"),
    ],
)
def test_before_anybody_waits(argv, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TF_CONFIG", config())
    argv = [*argv, "--strategy", "multiworker", "--output", str(tmp_path / "run")]
    assert main(RECIPE, argv) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(RecipeError, match=rf"worker 0: port {port} is not free"):
            workers.check_port(workers.Cluster((("worker 0", f"localhost:{port}"),), 0))


# ------------------------------------------------------------------- workers that are not there


WAITS = """
import ctypes, sys
from recipes.training import multiworker
cluster = multiworker.Cluster((("worker 0", "a:1"), ("worker 1", "b:2")), 0)
with multiworker.waiting(cluster, float(sys.argv[1])):
    # Holds Python's lock, as TensorFlow does while it waits for the others.
    ctypes.PyDLL(None).usleep(int(sys.argv[2]))
print("goes on")
"""


@pytest.mark.parametrize(
    ("timeout", "microseconds", "status"), [("0.3", "60000000", 1), ("60", "1", 0)]
)
def test_nobody_waits_for_ever(timeout, microseconds, status):
    done = subprocess.run(
        [sys.executable, "-c", WAITS, timeout, microseconds],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=HERE.parents[1],
    )
    lines = done.stderr.splitlines()
    assert lines[0] == "worker 0: waiting for worker 1 (b:2)"
    assert done.returncode == status and done.stdout == ("" if status else "goes on\n")
    assert len(lines) == 1 + status
    if status:
        assert lines[1].startswith("error: worker 0: another worker did not start within 0 seconds")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (tf.errors.UnavailableError(None, None, "Socket closed"), "another worker is gone. "),
        (tf.errors.AbortedError(None, None, "aborted"), "another worker is gone. "),
        (tf.errors.InternalError(None, None, "Collective ops is aborted by: x"), "worker is gone"),
        (
            tf.errors.DeadlineExceededError(None, None, "Collective has timed out"),
            "did not reach a common step within 600 seconds",
        ),
    ],
)
def test_what_a_lost_worker_looks_like(error, message):
    found = workers.lost(workers.read_cluster({"TF_CONFIG": config()}), error, 600)
    assert str(found).startswith("worker 0: ") and message in str(found)
    assert "--resume" in str(found)


def test_another_error_is_not_a_lost_worker():
    error = tf.errors.InvalidArgumentError(None, None, "shapes")
    assert workers.lost(workers.read_cluster({"TF_CONFIG": config()}), error, 600) is None


# ------------------------------------------------------------------------------ who computes what


def numbered(size):
    """Data whose examples are their own numbers."""
    import dataclasses

    data = load_data(RECIPE.options())
    split = Split(tf.data.Dataset.range(size), size)
    return dataclasses.replace(
        data,
        train=split,
        preprocess_train=lambda element, seed: (element, seed),
        preprocess_eval=lambda element: (element, element),
    )


class Worker:
    """Stands for the strategy of one of several workers, each with `local` devices."""

    def __init__(self, number, count, local):
        self.context = tf.distribute.InputContext(count, number, count * local)

    def distribute_datasets_from_function(self, make):
        return make(self.context)


@pytest.mark.parametrize(("count", "local"), [(2, 1), (3, 1), (3, 2)])
def test_each_batch_is_split_over_the_workers(count, local):
    """The same examples as in one process, with the same seeds of augmentation, each once."""
    data, batch = numbered(100), 12
    want = [
        {(int(a), *b.numpy().tolist()) for a, b in zip(x, seed, strict=True)}
        for x, seed in Feed(data, batch, seed=7).training(3).take(9)
    ]
    parts = [
        Feed(data, batch, seed=7, workers=Worker(w, count, local)).training(3).take(9 * local)
        for w in range(count)
    ]
    got = [[] for _ in want]
    for part in parts:
        for i, (x, seed) in enumerate(part):
            assert len(x) == batch // (count * local)
            got[i // local] += [(int(a), *b.numpy().tolist()) for a, b in zip(x, seed, strict=True)]
    assert [set(step) for step in got] == want
    assert all(len(step) == batch for step in got)


@pytest.mark.parametrize(
    "size", [31, 36, 85, *(pytest.param(n, marks=pytest.mark.slow) for n in (30, 37, 43, 100))]
)
@pytest.mark.parametrize(("count", "local"), [(1, 1), (2, 1), (3, 1), (2, 2)])
def test_evaluation_sees_every_example_once(count, local, size):
    data = numbered(size)
    feeds = [Feed(data, 12, workers=Worker(w, count, local)) for w in range(count)]
    batches = [list(feed.evaluation(data.train)) for feed in feeds]
    seen = sorted(int(i) for worker in batches for x, _ in worker for i in x)
    assert seen == list(range(size))
    # No worker, and none of its devices, comes away empty-handed in a step that others make.
    assert len({len(worker) for worker in batches}) == 1
    assert len(batches[0]) % local == 0
    for w, worker in enumerate(batches):
        assert int(feeds[w].evaluation(data.train).cardinality()) == len(worker)


# -------------------------------------------------------------------------------- the launcher


def python(code):
    return [sys.executable, "-c", textwrap.dedent(code)]


SHOW = """
    import json, os
    task = json.loads(os.environ["TF_CONFIG"])
    print("hello from", task["task"]["index"], len(set(task["cluster"]["worker"])))
"""


def test_each_worker_gets_its_place_and_its_lines_a_prefix(capfd):
    assert cluster.launch(python(SHOW), 3) == 0
    out = sorted(capfd.readouterr().out.splitlines())
    assert out == [f"[worker {i}] hello from {i} 3" for i in range(3)]


def test_one_fails_and_the_rest_is_ended(capfd):
    code = """
        import json, os, sys, time
        if json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 1:
            sys.exit(7)
        time.sleep(600)
    """
    assert cluster.launch(python(code), 3, grace=0.2) == 7
    error = capfd.readouterr().err
    assert "worker 1 ended with status 7" in error
    assert "worker 0, 2 did not end by itself" in error


def test_the_last_lines_of_a_worker_that_is_ended(capfd):
    code = """
        import json, os, signal, sys, time
        if json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 1:
            time.sleep(1)  # until the other one waits for its signal
            sys.exit(7)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("the last line"))
        time.sleep(600)
    """
    assert cluster.launch(python(code), 2, grace=0.2) == 7
    assert "[worker 0] the last line\n" in capfd.readouterr().out


def test_killed_workers_are_told_by_their_signal(capfd):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert cluster.launch(python(code), 1) == 128 + signal.SIGKILL
    assert "worker 0 was killed by signal 9 (SIGKILL)" in capfd.readouterr().err


def test_what_a_worker_started_ends_with_it(tmp_path, capfd):
    code = f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        time.sleep(600)
    """
    assert cluster.launch(python(code), 1, timeout=3) == 124
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    while alive(pid):
        assert time.monotonic() < deadline, "the worker's child goes on"
        time.sleep(0.1)


def alive(pid):
    """Whether a process runs; what only waits for its parent to look does not."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            != "Z"
        )
    except FileNotFoundError:
        return False


def test_the_command_line_adds_the_strategy(tmp_path, capfd):
    script = tmp_path / "recipe.py"
    script.write_text("import sys; print(*sys.argv[1:])")
    assert cluster.main(["--workers", "1", str(script), "--epochs", "2"]) == 0
    assert cluster.main(["--workers", "1", str(script), "--strategy", "none"]) == 0
    flags = ["--devices=1", "--strategy=none"]
    assert cluster.main(["--workers", "1", "--gpus", "2", str(script), *flags]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines == [
        "[worker 0] --epochs 2 --strategy multiworker",
        "[worker 0] --strategy none",
        "[worker 0] --devices=1 --strategy=none",
    ]


@pytest.mark.parametrize("argv", [["--workers", "0", __file__], ["absent.py"]])
def test_wrong_command_lines(argv, capsys):
    assert cluster.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


# ----------------------------------------------------------------------------- whole runs (slow)

# tiny_recipe with 3 steps between backups; one worker does something to itself at step 13 of 24.
STRUCK = """
import json, os, signal, sys, time
sys.path[:0] = [{root!r}, {here!r}]
import keras
from tiny_recipe import RECIPE
from recipes.training import callbacks, main

class Strike(keras.callbacks.Callback):
    steps = 0
    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps == 13 and json.loads(os.environ["TF_CONFIG"])["task"]["index"] == {victim}:
            {act}

chain = callbacks.chain
callbacks.chain = lambda *of_run: [*chain(*of_run), Strike()]
sys.exit(main(RECIPE, {argv!r}))
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
HANG = "time.sleep(600)"


def environment(folder):
    return {
        **os.environ,
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TMPDIR": str(folder),
    }


KEEP = ["--keep-backup", "--verbose", "quiet"]


def tiny(folder, count, *argv):
    argv = ["--output", str(folder), "--backup-every", "3", *KEEP, *argv]
    command = [sys.executable, str(HERE / "tiny_recipe.py"), "--strategy", "multiworker", *argv]
    return cluster.launch(
        command, count, environment=environment(folder.parent), grace=90, timeout=280
    )


def struck(folder, count, victim, act, *argv, grace=90):
    argv = ["--output", str(folder), "--backup-every", "3", *KEEP, *argv]
    code = STRUCK.format(
        root=str(HERE.parents[1]),
        here=str(HERE),
        victim=victim,
        act=act,
        argv=["--strategy", "multiworker", *argv],
    )
    command = [sys.executable, "-c", code]
    return cluster.launch(
        command, count, environment=environment(folder.parent), grace=grace, timeout=280
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two workers that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert tiny(folder, 2, "--tensorboard", "--monitor", "4") == 0
    return folder


@pytest.mark.slow
def test_one_set_of_files(whole):
    names = {path.name for path in whole.iterdir()} - {folders.LOCK}
    assert names == {
        "backup.npz", "best.keras", "config.json", "curves.png", "history.csv", "layers.csv",
        "monitor", "result.json", "tensorboard",
        "best.classes.json", "classes.csv", "confusion.png",
    }  # fmt: skip
    rows = folders.read_history(whole / folders.HISTORY)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert len(list((whole / "tensorboard/train").iterdir())) == 1
    assert (whole / "monitor/report.html").exists()
    assert checkpoint.load_backup(whole / folders.BACKUP)["step"] == 24


@pytest.mark.slow
@pytest.mark.parametrize(("count", "victim"), [(2, 0), (2, 1), (3, 1)])
def test_a_killed_worker_is_reported_and_the_run_goes_on(count, victim, whole, tmp_path, capfd):
    folder = tmp_path / "run"
    batch = ("--batch-size", "63") if count == 3 else ()
    assert struck(folder, count, victim, KILL, *batch) == 128 + signal.SIGKILL
    captured = capfd.readouterr()
    others = [i for i in range(count) if i != victim]
    for i in others:
        lines = [x for x in captured.out.splitlines() if x.startswith(f"[worker {i}] error: ")]
        assert len(lines) == 1, captured.out
        assert f"worker {i}: another worker is gone. " in lines[0] and "--resume" in lines[0]
        assert f"worker {i} ended with status 1" in captured.err
    assert "Traceback" not in captured.out
    assert checkpoint.load_backup(folder / folders.BACKUP)["step"] == 12

    assert tiny(folder, count, "--resume") == 0
    if count == 3:
        whole = tmp_path / "whole"
        assert tiny(whole, count, *batch) == 0
    expected, got = (checkpoint.load_backup(f / folders.BACKUP) for f in (whole, folder))
    assert got["step"] == expected["step"] == 24
    compare(expected, got)
    for name in (folders.HISTORY, folders.LAYERS):
        for a, b in zip(
            folders.read_history(whole / name), folders.read_history(folder / name), strict=True
        ):
            for key in set(a) & set(b):
                want = b[key] if isinstance(b[key], str) else pytest.approx(b[key], rel=1e-5)
                assert a[key] == want, key


def compare(expected, got):
    """The weights bit for bit; running sums, saved as the sum of the replicas', to rounding."""
    assert expected["paths"] == got["paths"]
    for path, a, b in zip(expected["paths"], expected["values"], got["values"], strict=True):
        if path.startswith(("conv", "bn", "predictions", "adamw")):
            np.testing.assert_array_equal(a, b, err_msg=path)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=path)
    assert sum(p.startswith(("conv", "bn", "predictions")) for p in expected["paths"]) >= 10


@pytest.mark.slow
def test_a_worker_that_hangs_is_not_waited_for_for_ever(tmp_path, capfd):
    folder = tmp_path / "run"
    assert struck(folder, 2, 1, HANG, "--worker-timeout", "25", grace=5) == 1
    captured = capfd.readouterr()
    assert "error: worker 0: another worker did not reach a common step within 25 s" in captured.out
    assert checkpoint.load_backup(folder / folders.BACKUP)["step"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("here", [0, 1])
def test_a_worker_that_never_comes(here, tmp_path):
    argv = ["--strategy", "multiworker", "--output", str(tmp_path / "run")]
    command = [sys.executable, str(HERE / "tiny_recipe.py"), *argv, "--worker-timeout", "3"]
    ended = subprocess.run(
        command,
        env={**environment(tmp_path), "TF_CONFIG": cluster.configs(2)[here]},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"error: worker {here}: another worker did not start within 3 seconds")
    assert "Traceback" not in ended.stderr and "most recent call" not in ended.stderr


@pytest.mark.slow
def test_a_folder_that_is_not_shared(whole, tmp_path, capfd):
    """Only the first worker finds the backup: the others must not start from nothing."""
    import shutil

    for i in (0, 1):
        shutil.copytree(whole, tmp_path / str(i))
        (tmp_path / str(i) / "result.json").unlink()  # as if it had not ended
    (tmp_path / "1" / folders.BACKUP).unlink()
    code = f"""
import json, os, sys
sys.path[:0] = [{str(HERE.parents[1])!r}, {str(HERE)!r}]
from tiny_recipe import RECIPE
from recipes.training import main
here = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
folder = {str(tmp_path)!r} + f"/{{here}}"
sys.exit(main(RECIPE, ["--resume", "--epochs", "4", "--output", folder]))
"""
    command = [sys.executable, "-c", code]
    status = cluster.launch(command, 2, environment=environment(tmp_path), timeout=120)
    assert status == 2
    assert "must be on a disk that all workers share" in capfd.readouterr().out
