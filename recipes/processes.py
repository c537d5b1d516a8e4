"""Processes that end with the context that started them."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

PATIENCE = 5.0  # seconds between SIGTERM and SIGKILL

Processes = Mapping[str, subprocess.Popen]


@contextlib.contextmanager
def started(
    command: Sequence[str],
    environments: Mapping[str, Mapping[str, str]],
    output: Callable[[str], IO] | None = None,
) -> Iterator[Processes]:
    """Starts a process for each environment.

    Those still running at the end of the context get SIGTERM, and SIGKILL five seconds later; their
    child processes too.

    Args:
        command: program and arguments, the same for each.
        environments: the environment variables by the name of the process.
        output: returns the open file for a process's output; None: a pipe.
    """
    processes: dict[str, subprocess.Popen] = {}
    try:
        for name, environment in environments.items():
            with output(name) if output else contextlib.nullcontext(subprocess.PIPE) as file:
                processes[name] = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches only this process
                )
        yield processes
    finally:
        running = [process for process in processes.values() if process.poll() is None]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            deadline = time.monotonic() + PATIENCE
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0, deadline - time.monotonic()))


def ending(code: int) -> str:
    """`"ended with status 1"`, or `"was killed by signal 9 (SIGKILL)"`, for a `returncode`."""
    if code >= 0:
        return f"ended with status {code}"
    return f"was killed by signal {-code} ({signal.Signals(-code).name})"
