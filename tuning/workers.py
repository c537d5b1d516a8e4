"""KerasTuner's chief and workers; a lost worker's trial goes to another worker.

KerasTuner reads KERASTUNER_TUNER_ID, KERASTUNER_ORACLE_IP and KERASTUNER_ORACLE_PORT. Its chief
waits forever for a worker that was killed. Here every worker updates a file in the search's folder
every two seconds; if it stops, the chief gives its trial to another worker.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recipes import processes

BEAT_SECONDS = 2.0
LOOPBACK = "127.0.0.1"
_PARENT = "TUNING_PARENT_PID"
_NAMES = ("KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT")


def role() -> str:
    """The role of this process: "alone", "chief" or "worker".

    Raises:
        ValueError: some of KerasTuner's variables are set and others are not.
    """
    missing = [name for name in _NAMES if name not in os.environ]
    if len(missing) == len(_NAMES):
        return "alone"
    if missing:
        raise ValueError(
            f"{', '.join(missing)} is not set: a search on several machines needs all of "
            f"{', '.join(_NAMES)}"
        )
    return "chief" if "chief" in os.environ["KERASTUNER_TUNER_ID"] else "worker"


@contextlib.contextmanager
def started(number: int, folder: Path) -> Iterator[processes.Processes]:
    """Makes this process the chief and starts workers by its own command line.

    They end with the context, take the GPUs in turn, and write to `folder/worker-K.log`. With no
    worker the process keeps its role.
    """
    if not number:
        yield {}
        return
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    values = ("chief", LOOPBACK, str(port))
    os.environ |= {**dict(zip(_NAMES, values, strict=True)), "no_grpc_proxy": LOOPBACK}
    gpus, environments = _gpus(), {}
    for k in range(number):
        own = {"KERASTUNER_TUNER_ID": f"worker-{k}", _PARENT: str(os.getpid())}
        if gpus:
            own["CUDA_VISIBLE_DEVICES"] = gpus[k % len(gpus)]
        # Workers may share a GPU.
        growth = {"TF_FORCE_GPU_ALLOW_GROWTH": "true"}
        environments[f"worker-{k}"] = {**growth, **os.environ, **own}
    command = [sys.executable, *sys.orig_argv[1:]]
    with processes.started(
        command, environments, lambda name: open(folder / f"{name}.log", "a", encoding="utf-8")
    ) as workers:
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # a chief trains nothing
        yield workers


def _gpus() -> list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name]
    number = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return [str(i) for i in range(number)]


def _heartbeat_file(folder: Path, name: str) -> Path:
    return folder / "workers" / f"{name}.alive"


@contextlib.contextmanager
def heartbeat(folder: Path) -> Iterator[None]:
    """Updates the worker's heartbeat file, and ends the worker when its chief has ended."""
    path = _heartbeat_file(folder, os.environ["KERASTUNER_TUNER_ID"])
    path.parent.mkdir(parents=True, exist_ok=True)
    parent = int(os.environ.get(_PARENT, 0))
    done = threading.Event()

    def beat():
        while not done.wait(BEAT_SECONDS):
            if parent and os.getppid() != parent:
                os._exit(1)  # nothing else would stop this process
            with contextlib.suppress(OSError):  # a network disk may fail for a moment
                path.write_text(str(time.monotonic()))

    path.write_text("0")
    thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def lead(
    serve: Callable[[], object],
    oracle: Any,
    folder: Path,
    timeout: float,
    local: processes.Processes,
    report: Callable[[str], object],
) -> None:
    """Serves workers until no trial is left, and reassigns the trials of lost workers.

    A worker is lost when its process on this machine (`local`) has ended, or when its heartbeat
    file has not changed for `timeout` seconds by the chief's own clock. `serve` is KerasTuner's
    server, which returns when all workers have received "stop"; it sleeps for up to 20 seconds at a
    time, so it runs in a thread.

    Raises:
        RuntimeError: all workers on this machine failed.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            serve()
        except BaseException as error:
            errors.append(error)

    server = threading.Thread(target=run, daemon=True, name="chief")
    server.start()
    beats: dict[str, tuple[str | None, float]] = {}
    while server.is_alive():
        server.join(1.0)
        for name in oracle.workers:
            process = local.get(name)
            if process is None:
                lost = _is_silent(_heartbeat_file(folder, name), beats, timeout)
            else:
                lost = process.poll() is not None
            trial = oracle.lose_worker(name) if lost else None
            if trial is not None:
                report(f"{name} is lost; its trial {trial} goes to another worker")
        codes = [process.poll() for process in local.values()]
        if codes and None not in codes:
            if 0 in codes:  # it was sent "stop": no trial is left
                return
            raise RuntimeError(
                f"all workers have ended; see {folder}/worker-0.log. The same command resumes the "
                "search"
            )
    for error in errors:
        raise error


def _is_silent(path: Path, beats: dict[str, tuple[str | None, float]], timeout: float) -> bool:
    """Whether a heartbeat file is unchanged for `timeout` seconds; `beats` stores the last."""
    try:
        beat = path.read_text(encoding="utf-8")
    except OSError:
        return False  # no shared folder, or a moment's failure: not lost
    before, since = beats.get(path.name, (None, 0.0))
    if beat != before:
        beats[path.name] = (beat, time.monotonic())
        return False
    return time.monotonic() - since > timeout
