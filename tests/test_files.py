"""Files after a full disk, a failing writer, or a kill in the middle of a line."""

import errno
import os

import pytest

from keras_gradclip import files
from keras_gradclip.names import did_you_mean


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_full_disk_leaves_the_file_of_before(tmp_path, monkeypatch, moment):
    path = tmp_path / "rows.csv"
    files.write_csv(path, ["a", "b"], [{"a": 1, "b": "x"}])
    before = path.read_bytes()
    monkeypatch.setattr(os, moment, full_disk)
    with pytest.raises(OSError, match="No space left"):
        files.write_csv(path, ["a", "b"], [[2, "y"]])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["missing/page.html", "file/page.html", "folder"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=str(tmp_path / place)) as error:
        files.write_text(tmp_path / place, "")
    assert ".partial" not in str(error.value)


def test_csv_and_json_come_back(tmp_path):
    table, text = tmp_path / "t.csv", tmp_path / "t.json"
    assert files.read_csv(table) == []
    files.append_csv(table, ["step", "layer"], [[0, "größe,1"]])
    files.append_csv(table, ["step", "layer"], [[1, ""]])
    rows = [{"step": 0.0, "layer": "größe,1"}, {"step": 1.0, "layer": ""}]
    assert files.read_csv(table) == rows
    files.write_json(text, rows)
    assert files.read_json(text) == rows


def test_damaged_files_are_named_with_their_line(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n3,")
    assert files.read_csv(path) == [{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": ""}]
    path.write_text("a,b\n1,2\n3")  # what a kill leaves
    assert files.read_csv(path) == [{"a": 1.0, "b": 2.0}]
    path.write_text("a,b\n1\n2,3\n")
    with pytest.raises(ValueError, match=r"t\.csv, line 2: 1 fields, and 2 in the first line"):
        files.read_csv(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a CSV file"):
        files.read_csv(path)
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"t\.csv.*: not JSON"):
            files.read_json(path)


def test_did_you_mean():
    assert did_you_mean("absolut", ["norm", "absolute"]) == ", did you mean 'absolute'?"
    assert did_you_mean("xyz", ["norm"]) == ""


@pytest.mark.parametrize(
    ("left", "want"),
    [
        ("", ["a,b", "3,4"]),
        ("a,", ["a,b", "3,4"]),
        ("a,b\r\n1", ["a,b", "3,4"]),
        ("a,b\r\n1,2\r\n1", ["a,b", "1,2", "3,4"]),
        ("a,b\r\n1,2", ["a,b", "1,2", "3,4"]),
        ("a,b\r\n1,2\r\n", ["a,b", "1,2", "3,4"]),
    ],
)
def test_a_line_is_not_added_to_half_of_one(left, want, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text(left, newline="")
    files.append_csv(table, ["a", "b"], [[3, 4]])
    assert table.read_text().split() == want
