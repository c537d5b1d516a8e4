"""Training on several machines: the cluster, and a one-line error if a worker is missing.

After a mistake in the environment variable TF_CONFIG, TensorFlow's `MultiWorkerMirroredStrategy`
waits forever for workers. Here TF_CONFIG is checked first, and every wait has a time-out. See
docs/cluster.md.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from recipes.errors import RecipeError, WorkerLost
from recipes.training.options import Options

_EXAMPLE = (
    '\'{"cluster": {"worker": ["10.0.0.1:12345", "10.0.0.2:12345"]}, '
    '"task": {"type": "worker", "index": 0}}\''
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers that train together, including this process.

    Attributes:
        tasks: pairs (name, address): "chief" or "worker 1", and "host:port". The chief comes
            first: the task `chief`, or worker 0 where there is none.
        here: int, the index of this process in `tasks`.
    """

    tasks: tuple[tuple[str, str], ...]
    here: int

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the files."""
        return self.here == 0

    @property
    def name(self) -> str:
        """The name of this process in messages."""
        return self.tasks[self.here][0]


def read_cluster(environment: Mapping[str, str] = os.environ) -> Cluster:
    """The cluster that TF_CONFIG describes.

    Raises:
        RecipeError: TF_CONFIG is missing or malformed; says where, and how to correct it.
    """
    text = environment.get("TF_CONFIG", "")
    if not text.strip():
        raise _wrong(
            f"is not set. Set on each machine, with its own index: TF_CONFIG={_EXAMPLE}; to try it "
            "out on one machine: python recipes/tools/cluster.py --workers 2 recipes/NAME.py"
        )
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"is not JSON ({error})") from None
    for key in ("cluster", "task"):
        if not isinstance(config, dict) or not isinstance(config.get(key), dict):
            raise _wrong(f"must be an object with {key!r}, an object too; for example {_EXAMPLE}")
    jobs, kind, index = config["cluster"], config["task"].get("type"), config["task"].get("index")
    tasks: dict[tuple[str, int], str] = {}
    for job in sorted(jobs):  # the chief first
        if job not in ("chief", "worker"):
            raise _wrong(f"has the job {job!r}: use 'worker's alone, and perhaps one 'chief'")
        if not isinstance(jobs[job], list) or not all(isinstance(a, str) for a in jobs[job]):
            raise _wrong(f"['cluster'][{job!r}] must be a list of 'host:port'")
        tasks |= {(job, number): address for number, address in enumerate(jobs[job])}
    if ("chief", 1) in tasks:
        raise _wrong("has more than one chief")
    if not tasks:
        raise _wrong("names no worker in ['cluster']['worker']")
    addresses = list(tasks.values())
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise _wrong(f"has the address {address!r}, which is not 'host:port'")
        if addresses.count(address) > 1:
            raise _wrong(f"gives the address {address!r} to two workers")
    if kind not in list(jobs):
        raise _wrong(f"['task']['type'] is {kind!r}, and must be one of {sorted(jobs)}")
    if type(index) is not int or (kind, index) not in tasks:
        raise _wrong(
            f"['task']['index'] is {index!r}, and must be a whole number from 0 to "
            f"{len(jobs[kind]) - 1}, another one on each {kind}"
        )
    names = [job if job == "chief" else f"worker {number}" for job, number in tasks]
    return Cluster(tuple(zip(names, addresses, strict=True)), list(tasks).index((kind, index)))


def _wrong(what: str) -> RecipeError:
    return RecipeError(f"--strategy multiworker: the environment variable TF_CONFIG {what}")


def join(options: Options, cluster: Cluster) -> Any:
    """The strategy over the workers of a cluster; waits until all of them have started.

    Raises:
        RecipeError: too few devices, or a batch size that they do not divide.
    """
    import tensorflow as tf

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
    check_port(cluster)
    if gpus:
        tf.config.set_visible_devices(gpus[: options.devices], "GPU")
    with waiting(cluster, options.worker_timeout):
        return tf.distribute.MultiWorkerMirroredStrategy(
            communication_options=tf.distribute.experimental.CommunicationOptions(
                timeout_seconds=options.worker_timeout
            )
        )


def check_port(cluster: Cluster) -> None:
    """Checks that this worker's port is free.

    Raises:
        RecipeError: another program uses it.
    """
    name, address = cluster.tasks[cluster.here]
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise RecipeError(
                f"{name}: port {port} is not free ({error.strerror}); an earlier run may still "
                "be alive: end it, or give another port in TF_CONFIG on all workers"
            ) from None


@contextlib.contextmanager
def waiting(cluster: Cluster, timeout: float) -> Iterator[None]:
    """Ends the process with one line and status 1 if the context takes longer than `timeout`.

    TensorFlow waits for other workers in C++ while it holds Python's GIL, so no Python thread or
    signal handler can run. The timer of `faulthandler` can: its output makes a second process
    print the line.
    """
    line = (
        f"error: {cluster.name}: another worker did not start within {timeout:.0f} seconds. Start "
        "every worker with the same command, see that the machines reach each other (firewall), "
        "or raise --worker-timeout"
    )
    say = "import sys; sys.stdin.buffer.read() and print(sys.argv[1], file=sys.stderr)"
    others = ", ".join(f"{name} ({a})" for name, a in cluster.tasks if name != cluster.name)
    if others:
        print(f"{cluster.name}: waiting for {others}", file=sys.stderr, flush=True)
    with subprocess.Popen(
        [sys.executable, "-S", "-c", say, line], stdin=subprocess.PIPE
    ) as speaker:
        assert speaker.stdin is not None
        faulthandler.dump_traceback_later(timeout, exit=True, file=speaker.stdin)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def lost(cluster: Cluster, error: Exception, timeout: float) -> WorkerLost | None:
    """The error to raise for a TensorFlow error caused by a lost worker; None for other causes.

    A collective operation fails within seconds of a lost connection or heartbeat, and after
    `timeout` seconds if a worker is alive but does not join it.
    """
    import tensorflow as tf

    gone = (tf.errors.UnavailableError, tf.errors.AbortedError)
    if isinstance(error, tf.errors.DeadlineExceededError):
        what = (
            f"another worker did not reach a common step within {timeout:.0f} seconds: it "
            "hangs, or needs more --worker-timeout"
        )
    elif isinstance(error, gone) or "Collective ops is aborted" in str(error):
        what = "another worker is gone"
    else:
        return None
    return WorkerLost(
        f"{cluster.name}: {what}. Its own output says why; then start every worker again with "
        "the same command and --resume"
    )


@contextlib.contextmanager
def named_losses(options: Options, cluster: Cluster) -> Iterator[None]:
    """Turns TensorFlow's errors about a lost worker into a `WorkerLost`."""
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        if named := lost(cluster, error, options.worker_timeout):
            raise named from error
        raise
