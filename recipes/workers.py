"""Training on several machines: who takes part, waiting for them, and saying which one is gone.

TensorFlow's `MultiWorkerMirroredStrategy` reads the environment variable TF_CONFIG, but takes a
mistake in it for a cluster that has not come up yet, and waits. Here it is checked first, and
nobody waits for ever. See CLUSTER.md.
"""

import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping

from recipes.errors import RecipeError

TF_CONFIG = "TF_CONFIG"
_EXAMPLE = (
    '\'{"cluster": {"worker": ["10.0.0.1:12345", "10.0.0.2:12345"]}, '
    '"task": {"type": "worker", "index": 0}}\''
)
_QUIET_START = 15.0  # seconds of waiting before a line says for whom
_LOOK = 2.0  # seconds for one attempt to reach a worker


class WorkerLost(RecipeError):
    """A worker died, hangs, or never came."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers that train together, this process among them.

    Attributes:
        tasks: pairs (name, address): "chief" or "worker 1", and "host:port". The chief comes
            first: the task `chief`, or worker 0 where there is none.
        here: int, the place of this process in `tasks`.
    """

    tasks: tuple[tuple[str, str], ...]
    here: int

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the files."""
        return self.here == 0

    @property
    def name(self) -> str:
        """What to call this process in messages."""
        return self.tasks[self.here][0]

    def others(self) -> list[tuple[str, str]]:
        """The tasks without this one."""
        return [task for i, task in enumerate(self.tasks) if i != self.here]


def read_cluster(environment: Mapping[str, str] = os.environ) -> Cluster:
    """The cluster that TF_CONFIG describes.

    Raises:
        RecipeError: TF_CONFIG is absent or malformed; says where, and what would be right.
    """
    text = environment.get(TF_CONFIG, "")
    if not text.strip():
        raise RecipeError(
            "--strategy multiworker: the environment variable TF_CONFIG is not set. Set on each "
            f"machine, with its own index: TF_CONFIG={_EXAMPLE}; to try it out on one machine: "
            "python recipes/cluster.py --workers 2 recipes/NAME.py"
        )
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise _wrong(f"is not JSON ({error})") from None
    cluster = _part(config, "cluster", "an object of jobs")
    task = _part(config, "task", "an object with 'type' and 'index'")
    unknown = sorted(set(cluster) - {"chief", "worker"})
    if unknown:
        raise _wrong(
            f"has the job {unknown[0]!r}: this strategy has 'worker's alone, and perhaps one "
            "'chief'"
        )
    tasks = []
    for job in ("chief", "worker"):
        addresses = cluster.get(job, [])
        if not isinstance(addresses, list) or not all(isinstance(a, str) for a in addresses):
            raise _wrong(f"['cluster'][{job!r}] must be a list of 'host:port'")
        for i, address in enumerate(addresses):
            _check_address(address)
            tasks.append((job, i, address))
    if len(cluster.get("chief", [])) > 1:
        raise _wrong("has more than one chief")
    if not tasks:
        raise _wrong("names no worker in ['cluster']['worker']")
    addresses = [address for _, _, address in tasks]
    twice = next((a for a in addresses if addresses.count(a) > 1), None)
    if twice:
        raise _wrong(f"gives the address {twice!r} to two workers")
    kind, index = task.get("type"), task.get("index")
    if kind not in cluster:
        raise _wrong(f"['task']['type'] is {kind!r}, and must be one of {sorted(cluster)}")
    count = len(cluster[kind])
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
        raise _wrong(
            f"['task']['index'] is {index!r}, and must be a whole number from 0 to {count - 1}, "
            f"another one on each {kind}"
        )
    here = next(i for i, (job, number, _) in enumerate(tasks) if (job, number) == (kind, index))
    return Cluster(
        tuple((job if job == "chief" else f"worker {i}", a) for job, i, a in tasks), here
    )


def _part(config: object, key: str, wanted: str) -> dict:
    if not isinstance(config, dict) or not isinstance(config.get(key), dict):
        raise _wrong(f"must be an object with {key!r}, {wanted}; for example {_EXAMPLE}")
    return config[key]


def _check_address(address: str) -> None:
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise _wrong(f"has the address {address!r}, which is not 'host:port'")


def _wrong(what: str) -> RecipeError:
    return RecipeError(f"--strategy multiworker: the environment variable TF_CONFIG {what}")


def check_port(cluster: Cluster) -> None:
    """Raises a RecipeError if another program has this worker's port: TensorFlow would hang."""
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
    """While the body waits for the others to start: tells for whom, and ends the process in time.

    TensorFlow waits inside its C++ library, where no exception gets in: this ends the process.

    Args:
        cluster: `Cluster`.
        timeout: seconds.
    """
    done = threading.Event()

    def watch() -> None:
        start = time.monotonic()
        if done.wait(min(_QUIET_START, timeout / 2)):
            return
        absent = silent(cluster)
        _tell(f"{cluster.name}: waiting for {_listed(absent or cluster.others())}")
        if done.wait(max(timeout - (time.monotonic() - start), 0.1)):
            return
        absent = silent(cluster)
        _tell(
            f"error: {cluster.name}: {_listed(absent or cluster.others())} did not come within "
            f"{timeout:.0f} seconds. Start every worker with the same command, see that the "
            "address can be reached from here (firewall), or raise --worker-timeout"
        )
        sys.stdout.flush()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def silent(cluster: Cluster) -> list[tuple[str, str]]:
    """The other workers at whose address nobody listens."""

    def listens(address: str) -> bool:
        host, _, port = address.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=_LOOK):
                return True
        except OSError:
            return False

    return [task for task in cluster.others() if not listens(task[1])]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _listed(tasks: list[tuple[str, str]]) -> str:
    return " and ".join(f"{name} ({address})" for name, address in tasks)


def lost(cluster: Cluster, error: Exception, timeout: float) -> WorkerLost | None:
    """What an error of TensorFlow's means for the cluster; None if it has another cause.

    A collective operation fails when a worker's connection breaks or its heartbeat stops, both
    within seconds, and after `timeout` seconds when a worker is alive but does not come to it.
    """
    import tensorflow as tf

    text = str(error)
    gone = isinstance(error, (tf.errors.UnavailableError, tf.errors.AbortedError))
    late = isinstance(error, tf.errors.DeadlineExceededError)
    if not (gone or late or "Collective ops is aborted" in text):
        return None
    named = []
    for job, index in re.findall(r"/job:(\w+)(?:/replica:\d+)?/task:(\d+)", text):
        name = "chief" if job == "chief" else f"worker {index}"
        named += [t for t in cluster.others() if t[0] == name and t not in named]
    # The one that reports is no casualty; and who has gone does not listen any more.
    absent = silent(cluster)
    blamed = [t for t in named if t in absent] or absent or ([] if late else named)
    if blamed:
        what = f"{_listed(blamed)} {'is' if len(blamed) == 1 else 'are'} gone"
    elif late:
        what = (
            f"the others did not come to a common step within {timeout:.0f} seconds, though all "
            "of them still listen: one hangs, or needs more --worker-timeout"
        )
    else:
        what = "the connection to another worker broke"
    return WorkerLost(
        f"{cluster.name}: {what}. Its own output says why; then start every worker again with "
        "the same command and --resume"
    )
