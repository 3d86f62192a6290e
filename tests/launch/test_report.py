import errno
import json

import pytest
from files import replacing
from matplotlib.figure import Figure
from report import Report


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_log_and_picture(tmp_path):
    report = Report(tmp_path, {"seed": 1, "out": tmp_path}, silent=False)
    for step in range(1, 41):
        report.log("train", step=step, loss=1 / step, d=1e-3)
    report.draw()  # before there are any test results
    first = (tmp_path / "progress.png").read_bytes()
    report.log("test", step=40, loss=0.1)
    report.draw()
    assert first.startswith(b"\x89PNG")
    assert (tmp_path / "progress.png").read_bytes() != first
    assert lines(tmp_path) == [{"kind": "run", "seed": 1, "out": str(tmp_path)}, *report.records]
    assert report.records[-1] == {"kind": "test", "step": 40, "loss": 0.1}


def test_log_goes_on_from_the_records_it_is_given(tmp_path):
    report = Report(tmp_path, {}, silent=False)
    report.log("train", epoch=1)
    kept = list(report.records)
    report.log("train", epoch=2)
    Report(tmp_path, {}, silent=False, records=kept).log("train", epoch=3)
    assert [line.get("epoch") for line in lines(tmp_path)] == [None, 1, 3]


def test_silent_report_writes_nothing(tmp_path, capfd):
    report = Report(tmp_path / "out", {}, silent=True)
    report.log("train", step=1, loss=1, d=1)
    report.draw()
    report.say("hello")
    assert list(report.bar([1, 2], "steps")) == [1, 2]
    assert report.records
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_is_told_by_the_file_that_it_has_no_room_for(tmp_path, monkeypatch):
    report = Report(tmp_path, {}, silent=False)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"log\.jsonl cannot be written: No space left on device$"):
        report.log("train", step=1, loss=1, d=1)

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match=r"progress\.png cannot be written: No space left on device$"):
        report.draw()


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with replacing(path) as draft:
            draft.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    with replacing(path) as draft:
        draft.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
