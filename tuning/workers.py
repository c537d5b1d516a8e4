"""Chief and workers: KerasTuner's own mode, with workers that may be lost.

KerasTuner reads KERASTUNER_TUNER_ID, KERASTUNER_ORACLE_IP and KERASTUNER_ORACLE_PORT. Its chief
waits for ever for a worker that was killed. Here every worker touches a file in the search's
folder, and the chief gives the trial of one that no longer does to another.
"""

import _thread
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

BEAT_SECONDS = 2.0
LOOPBACK = "127.0.0.1"
_PARENT = "TUNING_PARENT_PID"
_NAMES = ("KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT")


def role() -> str:
    """The part of this process: "alone", "chief" or "worker".

    Raises:
        ValueError: some of KerasTuner's variables are set and others are not.
    """
    missing = [name for name in _NAMES if name not in os.environ]
    if len(missing) == len(_NAMES):
        return "alone"
    if missing:
        raise ValueError(
            f"{', '.join(missing)} is not set: a search on several machines takes all of "
            f"{', '.join(_NAMES)}"
        )
    # KerasTuner's own rule.
    return "chief" if "chief" in os.environ["KERASTUNER_TUNER_ID"] else "worker"


def become_chief() -> dict[str, str]:
    """Makes this process the chief of workers on this machine; returns their environment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    oracle = {"KERASTUNER_ORACLE_IP": LOOPBACK, "KERASTUNER_ORACLE_PORT": str(port)}
    oracle["no_grpc_proxy"] = LOOPBACK
    os.environ |= {**oracle, "KERASTUNER_TUNER_ID": "chief"}
    return oracle


def start_workers(
    number: int, command: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> dict[str, subprocess.Popen]:
    """Starts workers on this machine, a GPU for each as far as they go; hides them from here.

    Args:
        number: of workers.
        command: the command line of a worker.
        folder: of the search; the workers' output goes to `worker-K.log` in it.
        environment: variables for the workers.

    Returns:
        The processes by worker id.
    """
    gpus = _gpus()
    workers = {}
    for k in range(number):
        name = f"worker-{k}"
        own = {**os.environ, **environment, "KERASTUNER_TUNER_ID": name, _PARENT: str(os.getpid())}
        own.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # they may share one
        if gpus:
            own["CUDA_VISIBLE_DEVICES"] = gpus[k % len(gpus)]
        with open(folder / f"{name}.log", "a") as log:
            workers[name] = subprocess.Popen(
                command,
                env=own,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the chief, which ends them in order
            )
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # a chief trains nothing
    return workers


def stop_workers(workers: Mapping[str, subprocess.Popen]) -> None:
    """Ends the workers that still run."""
    for process in workers.values():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in workers.values():
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _gpus() -> list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name]
    number = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return [str(i) for i in range(number)]


def _beat_file(folder: Path, name: str) -> Path:
    return folder / "workers" / f"{name}.alive"


@contextlib.contextmanager
def heartbeat(folder: Path) -> Iterator[None]:
    """While open, shows the chief that this worker lives, and ends it if its launcher is gone."""
    path = _beat_file(folder, os.environ.get("KERASTUNER_TUNER_ID", str(os.getpid())))
    path.parent.mkdir(parents=True, exist_ok=True)
    parent = int(os.environ.get(_PARENT, 0))
    done = threading.Event()

    def beat():
        count = 0
        while not done.wait(BEAT_SECONDS):
            if parent and os.getppid() != parent:
                os._exit(1)  # nobody would ever ask this process to stop
            count += 1
            with contextlib.suppress(OSError):  # a hiccup of a network disk; the next may succeed
                path.write_text(str(count))

    path.write_text("0")
    thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Watchdog:
    """The chief's thread that takes trials back from workers that are gone.

    A worker is gone when its process on this machine has ended, or when its file in the folder
    has not changed for `timeout` seconds by the chief's own clock.

    As a context manager it ends with the workers of this machine: quietly once one of them was
    told that there is nothing left to do, with a RuntimeError where all of them failed.

    Args:
        oracle: `SearchOracle`.
        folder: of the search.
        timeout: seconds.
        workers: processes on this machine, by id.
        report: called with a line of text.
    """

    def __init__(
        self,
        oracle,
        folder: Path,
        timeout: float,
        workers: Mapping[str, subprocess.Popen],
        report: Callable[[str], object],
    ):
        self.oracle, self.folder, self.timeout = oracle, folder, timeout
        self.workers, self.report = workers, report
        self._ended: Literal["told to", "failed"] | None = None
        self._beats: dict[str, tuple[str, float]] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> bool:
        self._done.set()
        self._thread.join()
        if kind is not KeyboardInterrupt or self._ended is None:
            return False
        if self._ended == "failed":
            raise RuntimeError(
                f"all workers have ended; see {self.folder}/worker-0.log. The same command goes "
                "on with the search"
            ) from None
        return True

    def _watch(self):
        while not self._done.wait(1.0):
            for name in {*self.oracle.running, *self.oracle.workers}:
                if self._is_gone(name):
                    trial = self.oracle.lose_worker(name)
                    if trial is not None:
                        self.report(f"{name} is gone; its trial {trial} goes to another worker")
            codes = [process.poll() for process in self.workers.values()]
            if codes and None not in codes:
                self._ended = "told to" if 0 in codes else "failed"
                # KerasTuner's chief sleeps in the main thread, for 20 seconds or for ever.
                _thread.interrupt_main()
                return

    def _is_gone(self, name: str) -> bool:
        process = self.workers.get(name)
        if process is not None:
            return process.poll() is not None
        try:
            beat = _beat_file(self.folder, name).read_text()
        except OSError:
            return False  # no shared folder, or not now: never give up on a guess
        seen, since = self._beats.get(name, ("", 0.0))
        if beat != seen:
            self._beats[name] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > self.timeout


def worker_command() -> list[str]:
    """How to start this program again: as a script or as a module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name] if spec is not None else [sys.argv[0]]
    return [sys.executable, *program]
