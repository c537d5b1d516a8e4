"""Hypothesis in short runs, so that an unattended fuzz comes to its end and says how far it is."""

import contextlib
import os
import signal
import sys
import time
import traceback

import hypothesis

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 60))
SEED = int(os.environ.get("FUZZ_SEED", 0))
#: Parts that two processes can share.
PARTS = 2
#: Examples of one run. After ten, Hypothesis spends five of six on small changes of those before.
RUN = 10
#: One example may take so long, and the search for a smaller one that fails, too.
EXAMPLE_SECONDS, SHRINKING_SECONDS = 300, 60
#: A long run goes on after a failure or two.
MOST_FAILURES = 3 if EXAMPLES > 1000 else 1


@contextlib.contextmanager
def at_most(seconds):
    """A TimeoutError after `seconds`; without pytest-timeout, which has the same timer."""

    def stop(*_):
        raise TimeoutError(f"one example took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def one_run(check, examples, seed, strategy):
    """Checks so many draws; the first that fails shrinks for a while."""
    failed, shrinks_until = set(), float("inf")

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        report_multiple_bugs=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def run(example):
        nonlocal shrinks_until
        if time.monotonic() > shrinks_until and str(example) not in failed:
            return
        try:
            with at_most(EXAMPLE_SECONDS):
                check(example)
        except hypothesis.errors.UnsatisfiedAssumption:
            raise
        except Exception:
            if not failed:
                shrinks_until = time.monotonic() + SHRINKING_SECONDS
            failed.add(str(example))
            raise

    run()


def fuzzed(check, examples, strategy, capsys, part=0):
    """Checks so many draws from `strategy`; what fails is raised at the end, with its seed."""
    began, errors = time.monotonic(), []
    for done in range(0, examples, RUN):
        seed = SEED + part + PARTS * (done // RUN)
        try:
            one_run(check, min(RUN, examples - done), seed, strategy)
        except Exception as error:
            error.add_note(f"Again: FUZZ_SEED={seed} FUZZ_EXAMPLES={25 * RUN}")
            errors.append(error)
            if EXAMPLES > 1000:
                with capsys.disabled():
                    traceback.print_exception(error, file=sys.stdout)
        if EXAMPLES > 1000 and done % 100 == 0:
            with capsys.disabled():
                print(
                    f"part {part}: {done + RUN} of {examples} examples, {len(errors)} failures, "
                    f"{time.monotonic() - began:.0f} s",
                    flush=True,
                )
        if len(errors) == MOST_FAILURES:
            break
    if errors:
        raise ExceptionGroup("examples that fail", errors)
