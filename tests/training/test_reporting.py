import dataclasses
import errno
import json
import os
import re
import struct

import pytest
from PIL import Image

from training.config import TrainConfig
from training.errors import SaveError
from training.records import EpochRecord
from training.reporting import curves
from training.reporting.reporter import Reporter

# Those that each run has.
FIELDS = [f.name for f in dataclasses.fields(EpochRecord) if f.default is dataclasses.MISSING]


def record(epoch):
    return EpochRecord(epoch, 10 * epoch, *[0.5] * 10)


def new_reporter(tmp_path):
    config = TrainConfig(epochs=2).resolved()
    return Reporter(config, tmp_path, {"devices": "1 x cpu"}, records=[])


def scalars(path):
    """(tag, step, value) of every scalar in a TensorBoard event file."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:
        (length,) = struct.unpack_from("<Q", data)
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        for value in event.summary.value:
            yield value.tag, event.step, value.simple_value


def test_a_run_leaves_config_metrics_events_and_curves(tmp_path):
    with new_reporter(tmp_path) as reporter:
        for epoch in (1, 2):
            reporter.epoch(record(epoch))
            lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
            assert len(lines) == epoch
    folder = tmp_path
    assert json.loads((folder / "config.json").read_text())["arch"] == "fcn"
    assert [json.loads(line) for line in lines] == [record(1).to_json(), record(2).to_json()]
    with Image.open(folder / "curves.png") as curves:
        assert curves.size == (1320, 396)
    (events,) = folder.glob("events.out.tfevents.*")
    expected = {(name, 10 * epoch) for name in FIELDS for epoch in (1, 2)}
    assert {(tag, step) for tag, step, _ in scalars(events)} == expected
    assert not list(folder.glob("*.partial"))


def test_without_a_terminal_there_are_plain_lines(tmp_path, capsys):
    with new_reporter(tmp_path) as reporter:
        reporter.begin(1.25)
        reporter.progress(
            1, 0.5, dict.fromkeys(["loss", "accuracy", "eta", "images_per_second"], 1)
        )
        reporter.epoch(record(1))
        reporter.epoch(record(2))
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "\r" not in output
    lines = output.splitlines()
    assert lines[0] == "devices   1 x cpu"
    assert "compiled in 1.2 s" in lines
    assert sum(line.lstrip().startswith("epoch ") for line in lines) == 1
    assert any(line.lstrip().startswith("2      0.5000   50.0%") for line in lines)
    assert "50.00% after epoch 2, best 50.00% after epoch 1" in output
    assert any(re.fullmatch(r"curves +.*curves.png", line) for line in lines)


def test_short_epochs_share_a_plot(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "draw", lambda records, *_: drawn.append(len(records)))
    with new_reporter(tmp_path) as reporter:
        reporter.epoch(record(1))
        # As if a plot took a second, and so were due every hundred.
        reporter._drawing_seconds += 1
        for epoch in range(2, 6):
            reporter.epoch(record(epoch))
        assert drawn == [1]
        reporter._start -= 1000
        reporter.epoch(record(6))
    assert drawn == [1, 6]


def test_plots_that_cannot_be_drawn_are_a_warning(tmp_path, caplog):
    path = tmp_path / "curves.png"
    path.mkdir()
    with new_reporter(tmp_path) as reporter:
        reporter.epoch(record(1))
    assert caplog.messages == [f"cannot draw {path}: Is a directory"]


def test_a_record_that_cannot_be_written_is_an_error_that_says_where(tmp_path, monkeypatch):
    with new_reporter(tmp_path) as reporter:

        def full(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(reporter._tensorboard, "write", full)
        with pytest.raises(SaveError, match=f"^cannot write in {tmp_path}: No space left"):
            reporter.epoch(record(1))
        monkeypatch.undo()
        reporter.epoch(record(2))
