"""What a search's chief bears: many simulated workers, whose trials only sleep.

    python benchmarks/search_scale.py                     # 50 workers, 600 trials of 10 s
    python benchmarks/search_scale.py --workers 200 --seconds 30

The chief is `tuning/search.py` itself, as a process of its own; a worker is a thread here that asks
it for a trial over gRPC, as KerasTuner's do, sleeps, and reports. Prints, and writes to
runs/search-scale.csv, for each tenth of the trials: how many an hour, what part of the workers'
time was not spent in a trial, how long a request took, and what a trial cost the chief in
processor time and in bytes written.
"""

import argparse
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from keras_gradclip.files import write_csv  # noqa: E402

COLUMNS = (
    *("trials", "trials an hour", "of the ideal", "request, median s", "request, longest s"),
    *("chief, processor s a trial", "chief, bytes written a trial"),
)


class Fleet:
    """Workers as threads.

    Args:
        number: how many.
        seconds: that a trial takes, on average; each is drawn from half to one and a half times.
    """

    def __init__(self, number: int, seconds: float) -> None:
        self.number, self.seconds = number, seconds
        self.requests: list[tuple[float, float]] = []  # when it ended, how long it took
        self.ends: list[float] = []
        self._lock = threading.Lock()

    def run(self, chief: "Chief") -> None:
        """Works until the chief has no trial left."""
        threads = [
            threading.Thread(target=self._work, args=(k,), daemon=True) for k in range(self.number)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.1)
            if chief.process.poll():
                raise RuntimeError(f"the chief ended with status {chief.process.returncode}")

    def _work(self, number: int) -> None:
        # Private: what a worker of KerasTuner's speaks through, without the training around it.
        from keras_tuner.src.distribute.oracle_client import OracleClient

        client = OracleClient(SimpleNamespace())
        name, draw = f"worker-{number}", random.Random(number)
        while True:
            trial = self._asked(client.create_trial, name)
            if trial.status == "STOPPED":
                return
            if trial.status == "IDLE":
                time.sleep(1.0)
                continue
            time.sleep(self.seconds * draw.uniform(0.5, 1.5))
            self._asked(client.update_trial, trial.trial_id, {"val_accuracy": draw.random()})
            trial.status = "COMPLETED"
            self._asked(client.end_trial, trial)
            with self._lock:
                self.ends.append(time.monotonic())

    def _asked(self, function: Callable, *arguments: Any) -> Any:
        start = time.monotonic()
        answer = function(*arguments)
        with self._lock:
            self.requests.append((time.monotonic(), time.monotonic() - start))
        return answer


class Chief:
    """`tuning/search.py` as the chief of a search in `folder`."""

    def __init__(self, folder: Path, trials: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        address = {"KERASTUNER_ORACLE_IP": "127.0.0.1", "KERASTUNER_ORACLE_PORT": port}
        os.environ |= {**address, "KERASTUNER_TUNER_ID": "fleet", "no_grpc_proxy": "127.0.0.1"}
        command = [sys.executable, str(ROOT / "tuning/search.py"), "--output", str(folder)]
        command += ["--max-trials", str(trials), "--confirm-runs", "0"]
        self.process = subprocess.Popen(
            command, env={**os.environ, "KERASTUNER_TUNER_ID": "chief"}, stdout=subprocess.DEVNULL
        )
        self.samples: list[tuple[float, float, float]] = []  # when, processor seconds, bytes
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        proc, tick = Path(f"/proc/{self.process.pid}"), os.sysconf("SC_CLK_TCK")
        while not self._done.wait(0.5):
            fields = (proc / "stat").read_text().rpartition(")")[2].split()
            written = dict(line.split(": ") for line in (proc / "io").read_text().splitlines())
            seconds = (int(fields[11]) + int(fields[12])) / tick
            self.samples.append((time.monotonic(), seconds, float(written["wchar"])))

    def at(self, moment: float) -> tuple[float, float]:
        """Processor seconds and bytes written so far, at the sample next to a moment."""
        _, seconds, written = min(self.samples, key=lambda sample: abs(sample[0] - moment))
        return seconds, written

    def close(self) -> None:
        """Stop measuring, and wait until it has written its report."""
        self._done.set()
        self._thread.join()
        if self.process.wait(timeout=120):
            raise RuntimeError(f"the chief ended with status {self.process.returncode}")


def table(fleet: Fleet, chief: Chief, parts: int = 10) -> list[dict[str, str]]:
    """A row for each part of the trials, in the order in which they ended."""
    ideal = 3600 * fleet.number / fleet.seconds
    size, rows = len(fleet.ends) // parts, []
    for k in range(parts):
        moments = fleet.ends[k * size : (k + 1) * size]
        start, end = (fleet.ends[k * size - 1] if k else moments[0]), moments[-1]
        took = [seconds for when, seconds in fleet.requests if start <= when <= end]
        before, after = chief.at(start), chief.at(end)
        rate = 3600 * size / (end - start)
        figures = (
            *(f"{k * size + 1} to {(k + 1) * size}", f"{rate:.0f}", f"{rate / ideal:.2f}"),
            *(f"{statistics.median(took):.4f}", f"{max(took):.3f}"),
            *(f"{(after[0] - before[0]) / size:.4f}", f"{(after[1] - before[1]) / size:.0f}"),
        )
        rows.append(dict(zip(COLUMNS, figures, strict=True)))
    return rows


def main() -> None:
    """Measure and print."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=50)
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a trial, on average")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/search-scale.csv")
    options = parser.parse_args()
    if options.workers < 1 or options.trials < 20 or not options.seconds > 0:
        parser.error("--workers must be 1 or more, --trials 20 or more, --seconds above 0")
    with tempfile.TemporaryDirectory() as folder:
        chief = Chief(Path(folder) / "search", options.trials)
        fleet = Fleet(options.workers, options.seconds)
        try:
            fleet.run(chief)
            chief.close()
        finally:
            chief.process.kill()
    rows = table(fleet, chief)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(options.out, COLUMNS, rows)
    shown = Table(title=f"{options.workers} workers, trials of {options.seconds:g} s")
    for column in COLUMNS:
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(*row.values())
    Console(width=120).print(shown)


if __name__ == "__main__":
    main()
