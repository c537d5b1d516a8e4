"""Devices, machines and precision of a run."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from recipes.errors import RecipeError
from recipes.training import multiworker
from recipes.training.options import Options


def make_strategy(options: Options, cluster: multiworker.Cluster | None = None) -> Any:
    """The tf.distribute strategy, or None for one device without one.

    Args:
        options: the run's options.
        cluster: the workers, with `--strategy multiworker`; comes back when all of them are there.

    Raises:
        RecipeError: too few devices, or a batch that they cannot share evenly.
    """
    count = options.devices
    if cluster is not None:
        return _join(options, cluster)
    if options.strategy == "none" or (options.strategy == "auto" and count == 1):
        return None
    kind = device_kind()
    if kind == "CPU" and count > 1:
        # Too late after TensorFlow has started: then what there is must do.
        with contextlib.suppress(RuntimeError):
            tf.config.set_logical_device_configuration(
                tf.config.list_physical_devices("CPU")[0],
                [tf.config.LogicalDeviceConfiguration()] * count,
            )
        if options.jit:
            raise RecipeError(
                "--jit does not work on several CPU devices (XLA cannot reach the weights of one "
                "from another): leave out --jit or --devices"
            )
    names = [device.name for device in tf.config.list_logical_devices(kind)]
    if len(names) < count:
        raise RecipeError(f"--devices {count}: there are {len(names)} {kind}s")
    # Between CPUs TensorFlow would use collective operations, which remember the size of their
    # group for the rest of the process; a search or a comparison runs more than one size.
    reduction = None if kind == "GPU" else tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy(names[:count], cross_device_ops=reduction)


def device_kind() -> str:
    """The kind of device that a run computes on: "GPU" where TensorFlow sees one, else "CPU"."""
    return "GPU" if tf.config.list_physical_devices("GPU") else "CPU"


def _join(options: Options, cluster: multiworker.Cluster) -> Any:
    """The strategy over the workers of a cluster."""
    gpus = tf.config.list_physical_devices("GPU")
    if options.devices > max(len(gpus), 1):
        raise RecipeError(
            f"--devices {options.devices}: {cluster.name} has {len(gpus)} GPUs"
            + ("" if gpus else ", and a worker without any counts as one device")
        )
    replicas = options.devices * len(cluster.tasks)
    if options.batch_size % replicas:
        raise RecipeError(
            f"--batch-size {options.batch_size} is not divisible by the {replicas} devices of "
            f"{len(cluster.tasks)} workers"
        )
    if options.jit and not gpus:
        raise RecipeError("--jit does not work on workers without a GPU: leave it out")
    multiworker.check_port(cluster)
    if gpus:
        tf.config.set_visible_devices(gpus[: options.devices], "GPU")
    with multiworker.waiting(cluster, options.worker_timeout):
        return tf.distribute.MultiWorkerMirroredStrategy(
            communication_options=tf.distribute.experimental.CommunicationOptions(
                timeout_seconds=options.worker_timeout
            )
        )


@contextlib.contextmanager
def named_losses(options: Options, cluster: multiworker.Cluster | None) -> Iterator[None]:
    """Turns TensorFlow's errors over a lost worker into one that names it."""
    try:
        yield
    except tf.errors.OpError as error:
        lost = cluster and multiworker.lost(cluster, error, options.worker_timeout)
        if not lost:
            raise
        raise lost from error


@contextlib.contextmanager
def dtype_policy(mixed_precision: str) -> Iterator[None]:
    """Keras's policy for the run ("none", "float16" or "bfloat16"), and the caller's after it."""
    before = keras.config.dtype_policy()
    if mixed_precision != "none":
        keras.config.set_dtype_policy(f"mixed_{mixed_precision}")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
