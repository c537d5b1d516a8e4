"""Several processes train as one does, at the same global batch (MultiWorkerMirroredStrategy).

The processes talk over the loopback interface.
"""

import functools
import json
import os
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from multiworker_scenarios import SCENARIOS

from keras_gradclip import _workers as _chief
from keras_gradclip import aggregation
from recipes.tools.cluster import launch

HERE = Path(__file__).resolve().parent
TOLERANCE = 2e-5
# Sums in another order decide how float16 rounds.
HALF = {"half-precision": 2e-3, "loss-scale": 2e-3}
# CPU processes: one thread each, no noise.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(HERE.parent),
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def run_workers(count, folder, names, capfd):
    command = [sys.executable, str(HERE / "multiworker_scenarios.py"), str(folder)]
    status = launch(
        [*command, json.dumps(names)], count, environment=ENVIRONMENT, timeout=280, grace=15
    )
    assert status == 0, capfd.readouterr().out[-4000:]


@functools.cache
def unclipped():
    return SCENARIOS["no-clipper"](None)["weights"]


# ------------------------------------------------------------------------------- several processes


GROUPS = {
    "clippers-1": [name for name in SCENARIOS if name.startswith("clipper-")][::2],
    "clippers-2": [name for name in SCENARIOS if name.startswith("clipper-")][1::2],
    "others-1": [name for name in SCENARIOS if not name.startswith("clipper-")][::2],
    "others-2": [name for name in SCENARIOS if not name.startswith("clipper-")][1::2],
}


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("count", [2, 3])
def test_parity_with_one_process(count, group, tmp_path, capfd):
    run_workers(count, tmp_path, GROUPS[group], capfd)
    for name in GROUPS[group]:
        one = SCENARIOS[name](None)
        if "skipped" in one:
            assert one["skipped"] == 1 and one["updates"] > 0, name
        if name.startswith("clipper-"):
            assert np.abs(one["weights"] - unclipped()).max() > 10 * TOLERANCE, "no clip: " + name
        for worker in range(count):
            with np.load(tmp_path / f"{name}-{worker}.npz") as file:
                many = dict(file)
            assert set(many) == set(one), name
            for key, value in one.items():
                if key == "batch_logs":
                    continue  # means of the replicas' means; compared among the workers below
                np.testing.assert_allclose(
                    many[key],
                    value,
                    atol=HALF.get(name, TOLERANCE),
                    rtol=HALF.get(name, 1e-4),
                    err_msg=f"{name}, worker {worker}: {key}",
                )
            # What callbacks see, and may stop training by, is the same everywhere to the last bit.
            with np.load(tmp_path / f"{name}-0.npz") as first:
                for key, value in first.items():
                    np.testing.assert_array_equal(many[key], value, err_msg=f"{name}: {key}")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_exactly_one_all_reduce_an_update(count, tmp_path, capfd):
    run_workers(count, tmp_path, ["one-reduction"], capfd)
    for worker in range(count):
        calls = np.load(tmp_path / f"one-reduction-{worker}.npz")["calls"]
        assert calls.tolist() == [6]  # kernels and biases of three layers, in one list


@pytest.mark.slow
def test_the_chief_alone_writes(tmp_path, capfd):
    (tmp_path / "files").mkdir()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    before = ENVIRONMENT.get("TMPDIR")
    ENVIRONMENT["TMPDIR"] = str(scratch)
    try:
        run_workers(2, tmp_path, ["files"], capfd)
    finally:
        ENVIRONMENT.pop("TMPDIR")
        if before is not None:
            ENVIRONMENT["TMPDIR"] = before
    results = [np.load(tmp_path / f"files-{i}.npz") for i in (0, 1)]
    for result in results:
        np.testing.assert_array_equal(result["resumed"], result["whole"])
        np.testing.assert_array_equal(result["resumed"], results[0]["resumed"])
        assert str(result["place"]) == str(tmp_path / "files" / "epoch-{epoch}.keras")

    folder = tmp_path / "files"
    rows = (folder / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "0", "1", "2"]
    assert not (folder / "backup").exists()  # removed at the end, as Keras does
    steps = [row.split(",")[0] for row in (folder / "monitor/monitor.csv").read_text().split()[1:]]
    assert steps == [str(step) for step in (0, 1, 2) for _ in range(6)]
    assert len(list((folder / "tensorboard/train").iterdir())) == 2  # two fits of one process
    last = keras.models.load_model(folder / "epoch-3.keras")
    loaded = np.concatenate([np.asarray(w, "float64").ravel() for w in last.get_weights()])
    np.testing.assert_array_equal(loaded, results[0]["whole"])
    assert not [p for p in scratch.iterdir() if p.name.startswith("keras_gradclip-")]


# ---------------------------------------------------------------------------------- one process


class FakeStrategy:
    """What `chief_writes` asks of a strategy over workers, without a cluster."""

    def __init__(self, here, everywhere=None):
        self.here, self.everywhere = here, everywhere


@pytest.fixture
def cluster(monkeypatch):
    """Makes `FakeStrategy` pass for a strategy over two workers."""
    monkeypatch.setattr(aggregation, "spans_workers", lambda s: isinstance(s, FakeStrategy))
    monkeypatch.setattr(aggregation, "is_chief", lambda s: s is None or s.here == 0)
    monkeypatch.setattr(
        aggregation, "gather_numbers", lambda s, number: s.everywhere or [number, number]
    )


def writers(folder):
    return [
        keras.callbacks.ModelCheckpoint(folder / "m-{epoch}.keras"),
        keras.callbacks.CSVLogger(folder / "log.csv"),
        keras.callbacks.TensorBoard(folder / "tensorboard"),
        keras.callbacks.BackupAndRestore(folder / "backup"),
        keras.callbacks.EarlyStopping("loss"),
    ]


def test_the_chief_keeps_its_callbacks(tmp_path, cluster):
    given = writers(tmp_path)
    with _chief.chief_writes(FakeStrategy(0), given) as used:
        assert used is given
    with _chief.chief_writes(None, given) as used:
        assert used is given
    assert given[0].filepath == str(tmp_path / "m-{epoch}.keras")


@pytest.mark.parametrize("whole", [False, True], ids=["list", "CallbackList"])
def test_another_worker_writes_elsewhere_for_a_while(tmp_path, cluster, monkeypatch, whole):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    (tmp_path / "shared/backup").mkdir(parents=True)
    (tmp_path / "shared/backup/training_metadata.json").write_text('{"epoch": 2, "batch": 0}')
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    given = writers(tmp_path / "shared")
    passed = keras.callbacks.CallbackList(given, add_history=True, model=model) if whole else given
    before = sorted((tmp_path / "shared").rglob("*"))
    with _chief.chief_writes(FakeStrategy(1), passed) as used:
        model.fit(np.zeros((4, 2)), np.zeros((4, 1)), epochs=4, callbacks=used, verbose=0)
        written = {p.name for p in (tmp_path / "scratch").rglob("*")}
    # It restored what the chief had saved, and began at its epoch.
    assert {"m-3.keras", "m-4.keras", "log.csv"} <= written
    assert "m-2.keras" not in written
    assert not list((tmp_path / "scratch").iterdir())
    assert sorted((tmp_path / "shared").rglob("*")) == before
    assert given[0].filepath == str(tmp_path / "shared/m-{epoch}.keras")
    assert given[2].log_dir == str(tmp_path / "shared/tensorboard")
    if whole:
        assert passed.callbacks[3] is given[3]


def test_a_backup_that_not_all_workers_see(tmp_path, cluster):
    given = [keras.callbacks.BackupAndRestore(tmp_path / "backup")]
    with (
        pytest.raises(ValueError, match="a folder that all workers share"),
        _chief.chief_writes(FakeStrategy(1, [1.0, 0.0]), given),
    ):
        pass


def test_without_a_cluster_this_process_is_the_chief():
    mirrored = tf.distribute.MirroredStrategy(
        ["CPU:0"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    for strategy in (None, mirrored):
        assert not aggregation.spans_workers(strategy)
        assert aggregation.is_chief(strategy)


class Resolver:
    def __init__(self, cluster, kind, index):
        self.cluster, self.task_type, self.task_id = cluster, kind, index

    def cluster_spec(self):
        return tf.train.ClusterSpec(self.cluster)


@pytest.mark.parametrize(
    ("cluster", "kind", "index", "chief"),
    [
        ({"worker": ["a:1", "b:1"]}, "worker", 0, True),
        ({"worker": ["a:1", "b:1"]}, "worker", 1, False),
        ({"chief": ["c:1"], "worker": ["a:1"]}, "chief", 0, True),
        ({"chief": ["c:1"], "worker": ["a:1"]}, "worker", 0, False),
    ],
)
def test_who_is_the_chief(monkeypatch, cluster, kind, index, chief):
    class Fake:
        cluster_resolver = Resolver(cluster, kind, index)

    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", Fake)
    assert aggregation.spans_workers(Fake())
    assert aggregation.is_chief(Fake()) is chief


def test_a_cluster_of_one_is_none(monkeypatch):
    class Fake:
        cluster_resolver = Resolver({"worker": ["a:1"]}, "worker", 0)

    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", Fake)
    assert not aggregation.spans_workers(Fake())


def step_function(step, **attributes):
    """`make_step_function` on two local replicas, which it serves as well."""
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )

    class Model:
        distribute_strategy = strategy
        run_eagerly = False
        jit_compile = False
        steps_per_execution = attributes.get("steps_per_execution", 1)

    batches = tf.data.Dataset.range(12).batch(4)
    iterator = iter(strategy.experimental_distribute_dataset(batches))
    return aggregation.make_step_function(Model, step), iterator


def test_logs_of_any_shape_are_averaged():
    def step(batch):
        number = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, "float32")
        return {
            "scalar": number,
            "whole": tf.cast(4 * number, "int64"),
            "nested": {"vector": tf.stack([number, -number])},
            "text": tf.constant("as it is"),
            "number": 1.5,
        }

    function, iterator = step_function(step)
    logs = function(iterator)
    assert float(logs["scalar"]) == 0.5
    assert int(logs["whole"]) == 2 and logs["whole"].dtype == "int64"
    np.testing.assert_array_equal(logs["nested"]["vector"], [0.5, -0.5])
    assert logs["text"].numpy() == b"as it is"
    assert float(logs["number"]) == 1.5


def test_a_call_ends_with_the_data_and_no_step_is_half_done():
    with tf.device("CPU:0"):
        count = tf.Variable(0)

    def step(batch):
        with tf.device("CPU:0"):
            count.assign_add(1)  # depends on nothing in the batch
        return tf.reduce_sum(batch)

    function, iterator = step_function(step, steps_per_execution=2)
    function(iterator)
    assert float(function(iterator)) == (8 + 9 + 10 + 11) / 2  # the third batch, alone
    assert int(count) == 2 * 3  # two replicas
    with pytest.raises((StopIteration, tf.errors.OutOfRangeError)):
        function(iterator)
    assert int(count) == 2 * 3
