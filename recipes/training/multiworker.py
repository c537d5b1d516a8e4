"""Training on several machines: who takes part, waiting for them, and saying which one is gone.

TensorFlow's `MultiWorkerMirroredStrategy` reads the environment variable TF_CONFIG, but takes a
mistake in it for a cluster that has not come up yet, and waits. Here it is checked first, and
nobody waits for ever. See docs/cluster.md.
"""

import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import time
from collections.abc import Mapping, Sequence

from recipes.errors import RecipeError, WorkerLost

TF_CONFIG = "TF_CONFIG"
_EXAMPLE = (
    '\'{"cluster": {"worker": ["10.0.0.1:12345", "10.0.0.2:12345"]}, '
    '"task": {"type": "worker", "index": 0}}\''
)
_QUIET_START = 15.0  # seconds of waiting before a line says for whom
_LOOK = 2.0  # seconds for one attempt to reach a worker
_POLL = 0.2
_GO, _LATE = b"go\n", b"late "


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
            "python recipes/tools/cluster.py --workers 2 recipes/NAME.py"
        )
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
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
    if not isinstance(kind, str) or kind not in cluster:
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
    """Raises a RecipeError if another program has this worker's port."""
    name, address = cluster.tasks[cluster.here]
    port = _split(address)[1]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise RecipeError(
                f"{name}: port {port} is not free ({error.strerror}); an earlier run may still "
                "be alive: end it, or give another port in TF_CONFIG on all workers"
            ) from None


def meet(cluster: Cluster, timeout: float) -> None:
    """Comes back when all workers are there: the others report to the chief, at its address.

    TensorFlow would wait for them inside its C++ library and keep Python from running, so that
    nobody could say for whom, or stop.

    Raises:
        WorkerLost: somebody did not come within `timeout` seconds.
        RecipeError: the workers' TF_CONFIGs differ.
    """
    if len(cluster.tasks) > 1:
        (_await_others if cluster.is_chief else _report_to_chief)(cluster, timeout)


def _await_others(cluster: Cluster, timeout: float) -> None:
    host, port = _split(cluster.tasks[0][1])
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    here: dict[int, socket.socket] = {}
    start, told = time.monotonic(), False
    with socket.create_server(("", port), family=family) as server:
        server.settimeout(_POLL)
        try:
            while len(here) < len(cluster.tasks) - 1:
                for i in [i for i, connection in here.items() if _closed(connection)]:
                    here.pop(i).close()
                absent = [t for i, t in enumerate(cluster.tasks) if i and i not in here]
                waited = time.monotonic() - start
                if waited > timeout:
                    for connection in here.values():
                        with contextlib.suppress(OSError):
                            connection.sendall(_LATE + _listed(absent).encode() + b"\n")
                    raise _missing(cluster, _listed(absent), timeout)
                if waited > _QUIET_START and not told:
                    told = True
                    _tell(f"{cluster.name}: waiting for {_listed(absent)}")
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                number = _welcome(cluster, connection, here)
                if number is not None:
                    here[number] = connection
            for connection in here.values():
                connection.sendall(_GO)
                # The other end closes first: otherwise the port would not be free at once.
                connection.settimeout(_LOOK)
                with contextlib.suppress(OSError):
                    connection.recv(1)
        finally:
            for connection in here.values():
                connection.close()


def _welcome(cluster: Cluster, connection: socket.socket, here: Mapping) -> int | None:
    """The place of the worker that speaks; None for one that does not belong here."""
    connection.settimeout(_LOOK)
    try:
        report = json.loads(connection.makefile("rb").readline(1 << 20))
        number, tasks = int(report["here"]), report["tasks"]
    except (OSError, ValueError, KeyError, TypeError):
        connection.close()
        return None
    problem = None
    if tasks != [list(task) for task in cluster.tasks]:
        problem = f"names other workers on {cluster.name} than here"
    elif number in here:
        problem = f"has the same ['task'] on two machines: {cluster.tasks[number][0]}"
    if problem:
        with contextlib.suppress(OSError):
            connection.sendall(problem.encode() + b"\n")
        connection.close()
        return None
    return number


def _report_to_chief(cluster: Cluster, timeout: float) -> None:
    name, address = cluster.tasks[0]
    report = json.dumps({"here": cluster.here, "tasks": cluster.tasks}).encode() + b"\n"
    start, told = time.monotonic(), False
    patience = timeout + 2 * _LOOK  # the chief, if it is there, tells who is not
    while time.monotonic() - start < patience:
        with contextlib.suppress(OSError), socket.create_connection(_split(address), _LOOK) as up:
            up.sendall(report)
            left = patience - (time.monotonic() - start)
            up.settimeout(max(left, _LOOK))
            answer = up.makefile("rb").readline()
            if answer == _GO:
                return
            if answer.startswith(_LATE):
                who = answer.removeprefix(_LATE).decode().strip()
                raise _missing(cluster, who, timeout)
            if answer:
                raise _wrong(answer.decode().strip())
        if time.monotonic() - start > _QUIET_START and not told:
            told = True
            _tell(f"{cluster.name}: waiting for {name} ({address})")
        time.sleep(_POLL)
    raise _missing(cluster, _listed(cluster.tasks[:1]), timeout)


def _closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.setblocking(True)


def _missing(cluster: Cluster, who: str, timeout: float) -> WorkerLost:
    return WorkerLost(
        f"{cluster.name}: {who} did not come within {timeout:.0f} seconds. Start every "
        "worker with the same command, see that the machines reach each other (firewall), or "
        "raise --worker-timeout"
    )


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def silent(cluster: Cluster) -> list[tuple[str, str]]:
    """The other workers at whose address nobody listens."""

    def listens(address: str) -> bool:
        try:
            with socket.create_connection(_split(address), timeout=_LOOK):
                return True
        except OSError:
            return False

    return [task for task in cluster.others() if not listens(task[1])]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _listed(tasks: Sequence[tuple[str, str]]) -> str:
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
    # Not this worker; one that is gone accepts no connections any more.
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
