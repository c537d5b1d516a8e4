"""The progress of a run: lines of at most 80 columns, and files on the way to the first step."""

import re
import sys

import pytest

from recipes.training.callbacks import Progress

LOGS = {"loss": 1.2345e-05, "accuracy": 0.97123, "grad_norm": 3.0, "clip_fraction": 0.98765}
ENDS = {**LOGS, "val_accuracy": 0.5, "val_loss": 2.0, "learning_rate": 1.8e-05}


def shown(text):
    """The lines that a terminal shows, the longest state of each."""
    text = re.sub(r"\x1b\[\d+m|\x08", "", text)
    return [max(line.split("\r"), key=len).rstrip() for line in text.rstrip("\n").split("\n")]


@pytest.mark.parametrize("bar", [False, True])
def test_progress_fits_80_columns(capsys, monkeypatch, bar):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = Progress("accuracy", epochs=100, steps=20_018, done=20_000, bar=bar)
    progress.on_train_begin()
    for epoch in (98, 99):
        progress.on_epoch_begin(epoch)
        for batch in range(3):
            progress.on_train_batch_end(batch, LOGS)
        progress.on_epoch_end(epoch, ENDS)
    out = capsys.readouterr().out
    assert ("20001/20018" in out) == bar
    lines = shown(out)
    assert len(lines) == 3  # the head, and a line an epoch
    assert max(map(len, lines)) <= 80
    last = out.rstrip("\n").split("\n")[-1].split("\r")[-1]
    assert " ".join(last.split()) == "100/100 1.234e-05 0.9712 0.5000 98.8 % 1.8e-05 0"
    assert " ".join(lines[0].split()) == "epoch loss accuracy validation clipped rate seconds"
