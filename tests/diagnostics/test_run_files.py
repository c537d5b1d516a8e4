"""Reading a run's files: whole, damaged, cut and mixed."""

import json

import numpy as np
import pytest
from run_files import CLIPPED, write_run

import keras_gradclip as kgc
from keras_gradclip.diagnostics.findings import findings
from keras_gradclip.diagnostics.samples import (
    FIELDS,
    RunFiles,
    _rows_before,
    read_rows,
    read_run,
)


def append(path, text):
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_missing_files_and_samples(tmp_path):
    with pytest.raises(ValueError, match=r"holds no monitor\.csv.*ClipMonitor\(run_dir\)"):
        kgc.report(tmp_path)
    with pytest.raises(ValueError, match="holds no samples"):
        kgc.report(write_run(tmp_path / "r", []))
    run = write_run(tmp_path / "r", [{}])
    (run / "thresholds.csv").unlink()
    assert read_run(run).thresholds == {}
    (run / "monitor.json").unlink()
    with pytest.raises(ValueError, match=r"holds no monitor\.json"):
        kgc.report(run)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{}", "lacks `clipper`"),
        (b"[]", "lacks `clipper`"),
        (b'{"clipper": null, "clipper_text": "", "variables": [{"path": 1}]}', "lacks `clipper`"),
        (b'{\n"clipper": ', r"monitor\.json, line 2: not JSON"),
        (b"\xff\xfe\x00", r"monitor\.json: not JSON"),
    ],
)
def test_a_damaged_description_is_refused(content, message, tmp_path):
    run = write_run(tmp_path / "r", [{}])
    (run / "monitor.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        kgc.report(run)


@pytest.mark.parametrize("content", [b"", b"\x00\xff\x8b" * 50, b"step,variable\n1,x\n"])
def test_samples_without_a_header_are_refused(content, tmp_path):
    run = write_run(tmp_path / "r", [{}])
    (run / "monitor.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"line 1 of .*monitor\.csv is no header"):
        kgc.report(run)


def test_a_table_saved_by_a_spreadsheet_is_whole(tmp_path):
    run = write_run(tmp_path / "r", [{}])
    path = run / "monitor.csv"
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert read_run(run).problems == ()


@pytest.mark.parametrize(
    "line", ["12,0,conv1/kern", "x,0,conv1/kernel,1,1,0,1,0,0", "\0\0\0", '"' + "x" * 200_000]
)
def test_damaged_lines_are_left_out_and_named(line, tmp_path):
    run = write_run(tmp_path / "r", [{}, {"conv1": CLIPPED}])
    whole = read_run(run)
    append(run / "monitor.csv", line)
    append(run / "thresholds.csv", "3,max_norm,0.5\n4,max_no")
    damaged = read_run(run)
    for name, values in whole.figures.items():
        np.testing.assert_array_equal(damaged.figures[name], values)
    assert damaged.thresholds["max_norm"][1].tolist() == [0.5]
    (found,) = [f for f in findings(damaged) if "left out" in f.text]
    assert found.level == "bad"
    assert found.details[0].startswith("line 14 of monitor.csv")
    assert found.details[1].startswith("line 3 of thresholds.csv")
    assert "line 14 of monitor.csv" in kgc.report(run).read_text(encoding="utf-8")


def test_nothing_but_damaged_lines_is_refused_with_the_first(tmp_path):
    run = write_run(tmp_path / "r", [])
    append(run / "monitor.csv", "12,0,conv1/kern\n")
    with pytest.raises(ValueError, match=r"no samples.*line 2 of monitor\.csv"):
        kgc.report(run)


def test_rows_of_a_layer_frozen_since_are_named(tmp_path):
    """The files of a run that went on with fewer variables hold rows of all of them."""
    run = write_run(tmp_path / "r", [{}, {"head": CLIPPED}])
    described = json.loads((run / "monitor.json").read_text())
    del described["variables"][:2]
    (run / "monitor.json").write_text(json.dumps(described))
    frozen = read_run(run)
    assert frozen.layers == ["conv2", "head"]
    np.testing.assert_array_equal(frozen.steps, [0, 1])
    assert frozen.problems == (
        "4 lines of monitor.csv name variables that monitor.json does not list, as after "
        "freezing a layer: conv1/kernel, conv1/bias",
    )


def test_a_sample_without_a_layer_counts_only_what_it_has(tmp_path):
    """A cut sample, or one from before a layer was unfrozen, is no NaN."""
    run = write_run(tmp_path / "r", [{"head": CLIPPED}] * 3)
    lines = (run / "monitor.csv").read_text().splitlines(keepends=True)
    (run / "monitor.csv").write_text("".join(lines[:-2]))  # the head of the last sample
    cut = read_run(run)
    np.testing.assert_array_equal(cut.measured[-1], [True, True, False])
    assert np.isnan(cut.figures["norm_before"][-1, 2])
    np.testing.assert_allclose(cut.global_before, [6, 6, 2])
    assert not any("not finite" in f.text for f in findings(cut))
    kgc.report(run)


def test_a_step_may_be_sampled_twice(tmp_path):
    run = write_run(tmp_path / "r", [{}, {}])
    text = (run / "monitor.csv").read_text().replace("\n1,", "\n0,")
    (run / "monitor.csv").write_text(text)
    np.testing.assert_array_equal(read_run(run).steps, [0, 0])


ROW = "9,0,conv1/kernel,1,1,0,1,0,0"


@pytest.mark.parametrize(
    "name, damage",
    [
        (name, damage)
        for name, row in (("monitor.csv", ROW), ("thresholds.csv", "9,max_norm,1"))
        for damage in (
            b"\0" * 200_000,
            b"\0" * 99 + row.encode() + b"\r\n",
            b"\xff,0\r\n",
            row.encode()[:-4] + b"\xff\xfe" + row.encode()[-4:] + b"\r\n",
            "²".encode() + row[1:].encode() + b"\r\n",
            b"99999999999999999999" + row[1:].encode() + b"\r\n",
            row[:-3].encode().replace(b"9,", b'9,"', 1) + b"\r\n",
            b'"' + b"x" * 200_000 + b"\r\n",
            row.encode() + b",1\r\n",
        )
    ],
)
@pytest.mark.parametrize("at", ["start", "head", "middle", "end"])
def test_what_can_be_read_is_kept_by_a_run_that_goes_on(name, damage, at, tmp_path):
    """The report and the resumed monitor read one format, and leave out the same lines."""
    run = write_run(
        tmp_path / "r", [{"conv1": CLIPPED}] * 3, thresholds=[[i, "max_norm", i] for i in range(3)]
    )
    path = run / name
    whole, _ = read_rows(path)
    lines = path.read_bytes().splitlines(keepends=True)
    place = {"start": 0, "head": 1, "middle": 2, "end": len(lines)}[at]
    if at == "head":
        lines[0] = b""
    path.write_bytes(b"".join([*lines[:place], damage, *lines[place:]]))
    rows, problems = read_rows(path)
    assert [row for row in rows if row["step"] != "9"] == whole
    assert len(rows) - len(whole) == damage.startswith(b"\0" * 99 + b"9"), "a row behind NULs"
    assert len(problems) == 1 + (at == "head"), problems
    assert f"line {place + (at != 'head')} of {name}" in problems[-1]
    assert len(read_run(run).steps) >= 3
    with pytest.warns(UserWarning, match=f"skipped damaged lines of .*{name}"):
        assert _rows_before(path, {"conv1/kernel": 9}) == whole
    assert _rows_before(path, {"conv1/kernel": 0}) == [], "a fresh run begins anew"


def test_each_optimizers_rows_are_kept_up_to_its_own_updates(tmp_path):
    run = write_run(tmp_path / "r", [{}] * 4, thresholds=[[i, "max_norm", i] for i in range(4)])
    starts = {"conv1/kernel": 3, "conv1/bias": 2}
    rows = _rows_before(run / "monitor.csv", starts)
    steps = {name: [int(r["step"]) for r in rows if r["variable"] == name] for name in starts}
    assert steps == {"conv1/kernel": [0, 1, 2], "conv1/bias": [0, 1]}
    assert len(_rows_before(run / "thresholds.csv", starts)) == 3


def test_any_name_is_a_row(tmp_path):
    """Of a rule that is a regular expression over two lines, too."""
    written = RunFiles(tmp_path, {"größe": 0}, {})
    names = ['a "b", c', "one\ntwo", "größe", "last"]
    figures = {field: np.ones(1) for field in FIELDS}
    written.add(0, 0, figures, {name: 0.1 * i for i, name in enumerate(names)})
    rows, problems = read_rows(tmp_path / "thresholds.csv")
    assert [row["name"] for row in rows] == [name.replace("\n", " ") for name in names]
    assert [float(row["value"]) for row in rows] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [row["variable"] for row in read_rows(tmp_path / "monitor.csv")[0]] == ["größe"]
    assert problems == []
