"""The progress of a run: lines of at most 80 columns, and files on the way to the first step."""

import re
import sys
from pathlib import Path

import pytest
from tiny_recipe import RECIPE

import recipes
from recipes.training import main
from recipes.training.callbacks import Progress, percent

LOGS = {"loss": 1.2345e-05, "accuracy": 0.97123, "grad_norm": 3.0, "clip_fraction": 0.98765}
ENDS = {**LOGS, "val_accuracy": 0.5, "val_loss": 2.0, "learning_rate": 1.8e-05}


def shown(text):
    """The lines that a terminal shows, the longest state of each."""
    text = re.sub(r"\x1b\[\d+m|\x08", "", text)
    return [max(line.split("\r"), key=len).rstrip() for line in text.rstrip("\n").split("\n")]


@pytest.mark.parametrize("bar", [False, True])
def test_progress_fits_80_columns(capsys, monkeypatch, bar):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = Progress("accuracy", done=20_000, bar=bar)
    progress.set_params({"epochs": 100, "steps": 20_018})
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


@pytest.mark.parametrize(
    "share, text",
    [(0, "0 %"), (2.34e-9, "<0.001 %"), (1.234e-5, "0.00123 %"), (0.0465, "4.65 %"), (1, "100 %")],
)
def test_shares_leave_room_between_columns(share, text):
    assert percent(share) == text and len(text) < 10


def walk_to_the_first_step(argv):
    """The files of recipes/ that calls enter, each call from each line once, in their order.

    Without the data's and the models' own.
    """
    root, stays, calls = f"{Path(recipes.__file__).parent}/", [], set()
    names = {}  # of files by the id of their code: None if a call of it says nothing

    class Reached(BaseException):
        pass

    def name_of(code):
        path = code.co_filename.removeprefix(root)
        is_ours = code.co_filename.startswith(root) and not path.startswith(("data/", "models/"))
        is_named = not code.co_name.startswith("<") and code.co_name != "__getattr__"
        return path if is_ours and is_named else None

    def follow(frame, event, _):
        if event != "call":
            return
        code, caller = frame.f_code, frame.f_back
        if id(code) not in names:
            if code.co_name == "train_step":
                sys.setprofile(None)
                raise Reached
            names[id(code)] = name_of(code)
        name = names[id(code)]
        call = name and (caller.f_code, caller.f_lineno, code)
        if call and call not in calls:
            calls.add(call)
            if stays[-1:] != [name]:
                stays.append(name)

    before = sys.getprofile()
    sys.setprofile(follow)
    try:
        main(RECIPE, argv)
    except Reached:
        return stays
    finally:
        sys.setprofile(before)
    pytest.fail("no step")


def test_files_from_main_to_the_first_step(tmp_path):
    """What somebody opens who follows a run: 15 files and 36 returns before it was one line."""
    argv = ["--output", str(tmp_path / "run"), "--verbose", "quiet", "--limit-steps", "1"]
    stays = walk_to_the_first_step(argv)
    assert len(set(stays)) <= 9 and len(stays) - len(set(stays)) <= 4, " > ".join(stays)
