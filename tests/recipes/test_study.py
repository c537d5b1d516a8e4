"""The runner of studies: what is run again, what it says of the time, the table, the picture."""

import functools
import itertools
import math
import subprocess
import sys

import pandas as pd
import pytest
from matplotlib.figure import Figure

from recipes.errors import RecipeError
from recipes.tools import study


def cells(jobs, *names, cost=1.0):
    """Cells that note in `jobs` that they ran."""

    def job(name):
        jobs.append(name)
        return {"status": "learned"}

    return [study.Cell({"name": n, "rate": 0.1}, n, lambda _, n=n: job(n), cost) for n in names]


def file_of(folder):
    return study.StudyFile(folder / "study.csv", ("name", "rate"), ("status", "seconds"), ("rate",))


def test_cells_with_a_row_are_not_run_again(tmp_path, capsys):
    jobs, file = [], file_of(tmp_path)
    file.run(cells(jobs, "a", "b"), str)
    rows = file.run(cells(jobs, "b", "c"), lambda row: row["status"])
    assert jobs == ["a", "b", "c"]
    assert list(rows["name"]) == ["b", "c"] and list(file.read()["name"]) == ["a", "b", "c"]
    assert "1 of 2 runs to do: about 0 s\n1 of 1: c\n  learned, 0 s\n" in (capsys.readouterr().out)


def test_a_cell_that_is_named_twice_runs_once(tmp_path, capsys):
    jobs, file = [], file_of(tmp_path)
    rows = file.run(cells(jobs, "a", "b", "a"), str)
    assert jobs == ["a", "b"] and list(rows["name"]) == ["a", "b"]
    assert "2 of 2 runs to do" in capsys.readouterr().out


def test_numbers_are_the_same_however_they_are_written(tmp_path):
    """As the files of earlier versions have them."""
    (tmp_path / "study.csv").write_text("name,rate,status,seconds\na,0.10,learned,3.5\n")
    jobs = []
    file_of(tmp_path).run(cells(jobs, "a"), str)
    assert not jobs


def test_a_file_may_have_its_columns_in_another_order_and_more_of_them(tmp_path):
    """As a spreadsheet leaves it."""
    path, jobs = tmp_path / "study.csv", []
    path.write_text("status,name,note,rate,seconds\nlearned,a,good,0.1,3.5\n")
    rows = file_of(tmp_path).run(cells(jobs, "a", "b"), str)
    assert jobs == ["b"] and list(rows["name"]) == ["a", "b"]
    assert list(rows["status"]) == ["learned"] * 2
    assert path.read_text().splitlines()[1:] == ["learned,a,good,0.1,3.5", "learned,b,,0.1,0.0"]


def test_a_last_line_that_was_cut_off_is_run_again(tmp_path):
    (tmp_path / "study.csv").write_text("name,rate,status,seconds\na,0.1,learned,3.5\nb,0.")
    jobs = []
    file_of(tmp_path).run(cells(jobs, "a", "b"), str)
    assert jobs == ["b"]
    assert [len(line.split(",")) for line in (tmp_path / "study.csv").read_text().split()] == [
        4
    ] * 3


@pytest.mark.parametrize("text", ["name,score\na,1\n", "name,rate,status,seconds\na,high,,\n"])
def test_another_table_is_refused(tmp_path, text):
    (tmp_path / "study.csv").write_text(text)
    with pytest.raises(RecipeError, match=r"study\.csv"):
        file_of(tmp_path).read()


def test_the_time_that_is_left_follows_from_the_rows(tmp_path, capsys):
    (tmp_path / "study.csv").write_text(
        "name,rate,status,seconds\na,0.1,learned,100\nb,0.1,learned,120\nc,0.1,learned,9000\n"
    )
    file_of(tmp_path).run(cells([], *"abcde"), str)
    assert "2 of 5 runs to do: about 4 min\n" in capsys.readouterr().out
    other = study.StudyFile(tmp_path / "other.csv", ("name", "rate"), ("status", "seconds"))
    other.run(cells([], "a", cost=3.0), str, pace=20.0)
    assert "1 of 1 runs to do: about 60 s\n" in capsys.readouterr().out


def test_the_first_run_tells_the_time_of_all_by_its_steps(tmp_path, capsys, monkeypatch):
    """Ten seconds of start, then a tenth of the run in every ten seconds."""
    now = [0.0]
    monkeypatch.setattr(study.time, "monotonic", lambda: now[0])

    def job(first_epoch, others):
        for steps in study.first_steps(others):
            steps.set_params({"epochs": 10, "steps": 1})
            now[0] += 10
            for epoch in range(first_epoch, 10):
                steps.on_epoch_begin(epoch)
                now[0] += 10
                steps.on_train_batch_end(0)
        return {"status": "learned"}

    def out_of(folder, first_epoch):
        jobs = [functools.partial(job, first_epoch) for _ in range(3)]
        cells = [
            study.Cell({"name": n, "rate": 0.1}, n, j) for n, j in zip("abc", jobs, strict=True)
        ]
        study.StudyFile(folder, ("name", "rate"), ("status", "seconds"), ("rate",)).run(cells, str)
        return capsys.readouterr().out

    assert "by its first steps" in (out := out_of(tmp_path / "new.csv", 0))
    assert "1 of 3: a\n  about 280 s in all" in out.replace("5 min", "280 s")
    assert out.count("first steps") == 1
    assert "about 200 s in all" in out_of(tmp_path / "resumed.csv", 8).replace("3 min", "200 s")


@pytest.mark.slow
def test_tensorflow_is_quiet_in_a_study():
    code = "from recipes.tools import study; study.first_steps(1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


def test_rows_that_are_dropped_leave_the_columns_of_the_user(tmp_path):
    path, file = tmp_path / "study.csv", file_of(tmp_path)
    path.write_text("status,name,note,rate,seconds\nlearned,a,good,0.1,3.5\nfailed,b,bad,0.1,1\n")
    file.drop(file.read()["status"] == "failed")
    assert path.read_text().split() == [
        "status,name,note,rate,seconds",
        "learned,a,good,0.1,3.5",
    ]
    file.drop(file.read()["status"] == "learned")
    assert list(file.run(cells([], "b"), str)["name"]) == ["b"]


def test_duration():
    assert [study.duration(s) for s in (4.2, 600, 9000)] == ["4 s", "10 min", "2.5 h"]


def rows():
    """Three learning rates: at 0.1 one of `none`'s two runs diverged, at 1 both."""
    nan = math.nan
    return pd.DataFrame(
        [
            *(("none", 0.01, 90.0, "learned"), ("none", 0.01, 92.0, "learned")),
            *(("none", 0.1, 80.0, "learned"), ("none", 0.1, nan, "diverged")),
            *(("none", 1.0, nan, "diverged"), ("none", 1.0, nan, "diverged")),
            *(("norm", 0.01, 85.0, "learned"), ("norm", 1.0, 10.0, "at chance")),
        ],
        columns=["clipper", "learning_rate", "score", "status"],
    )


def test_the_table_calls_chance_and_divergence_by_name():
    table = study.cross_table(rows(), "clipper", "learning_rate")
    assert list(table.columns) == ["clipper", "0.01", "0.1", "1"]
    assert table.to_numpy().tolist() == [
        ["none", "91.0 (90.0–92.0)", "80.0, 1 of 2 diverged", "2 of 2 diverged"],
        ["norm", "85.0", "", "10.0, 1 of 1 at chance"],
    ]


def test_the_picture_marks_what_diverged_and_labels_what_was_tried():
    figure = study.picture(rows(), "title", {"score": "accuracy, %"}, guess=10.0)
    [axis] = figure.axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.01", "0.1", "1"]
    none = next(line for line in axis.lines if line.get_label() == "none")
    assert list(none.get_ydata())[:2] == [91.0, 80.0] and math.isnan(none.get_ydata()[2])
    assert none.get_marker() == "_"  # a mean without a neighbour has no line
    crosses = next(line for line in axis.lines if line.get_marker() == "x")
    assert list(crosses.get_xdata()) == [0.1, 1.0]  # at the foot, whatever the accuracy there
    assert crosses.get_transform() == axis.get_xaxis_transform()
    assert "x: a run diverged" in figure.get_suptitle()


@pytest.mark.parametrize("low", [1e-20, 1e-5, 0.002, 0.5, 90])
def test_the_labels_of_a_logarithmic_axis_do_not_overlap(low):
    figure = Figure(figsize=(5, 3))
    axis = figure.subplots()
    axis.scatter([low, 100], [0, 1])
    study.log_axis(axis)
    figure.draw_without_rendering()
    low, high = axis.get_xlim()
    labels = [
        label
        for x, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)
        if low <= x <= high
    ]
    boxes = [label.get_window_extent() for label in labels]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_a_measure_that_no_run_has_yet_is_drawn_empty():
    """As the clip fraction of a comparison whose first clipper is `none`."""
    measures = {"score": "accuracy, %", "clipped": "clipped, %"}
    assert len(study.picture(rows().assign(clipped=math.nan), "title", measures).axes) == 2


def test_many_clippers_have_a_panel_each():
    many = pd.concat([rows().replace("norm", f"clip{n}") for n in range(study.MOST_LINES)])
    figure = study.picture(many, "title", {"score": "accuracy, %"})
    assert len(figure.axes) == study.MOST_LINES
    legends = [[text.get_text() for text in a.get_legend().get_texts()] for a in figure.axes]
    assert legends == [["none", f"clip{n}"] for n in range(study.MOST_LINES)]
