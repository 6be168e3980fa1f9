import os

import pytest

from training import workdir
from training.config import TrainConfig
from training.errors import ConfigError


def test_the_default_names_data_set_arch_and_time_and_is_fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workdir.time, "strftime", lambda _: "20300102-030405")
    path = workdir.choose(TrainConfig())
    assert path.as_posix() == "runs/digits-fcn-20300102-030405"
    path.mkdir(parents=True)
    assert workdir.choose(TrainConfig()).as_posix() == "runs/digits-fcn-20300102-030405-2"


def test_choosing_makes_nothing(tmp_path):
    workdir.choose(TrainConfig(workdir=tmp_path / "a" / "b"))
    assert not list(tmp_path.iterdir())


def test_a_second_run_is_kept_out_until_the_first_has_ended(tmp_path):
    folder = tmp_path / "a" / "b"
    with workdir.held(folder, restart=False) as aside:
        assert aside == ""
        with (
            pytest.raises(ConfigError, match=r"--workdir .*: another run is using it"),
            workdir.held(folder, restart=True),
        ):
            pass
    with workdir.held(folder, restart=False):
        pass


def leave_run(folder, checkpoint):
    names = ["config.json", "metrics.jsonl", "curves.png", "events.out.tfevents.1", "mine.txt"]
    for name in names:
        (folder / name).write_text("line")
    if checkpoint:
        (folder / "checkpoints" / "11").mkdir(parents=True)
    return names


def test_beginning_afresh_sets_the_earlier_run_aside_and_nothing_else(tmp_path):
    leave_run(tmp_path, checkpoint=True)
    with workdir.held(tmp_path, restart=True) as aside:
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"mine.txt", ".lock", os.path.basename(aside)}
    expected = {"config.json", "metrics.jsonl", "curves.png", "events.out.tfevents.1"}
    assert set(os.listdir(aside)) == expected | {"checkpoints"}
    # Once more, within the same second.
    leave_run(tmp_path, checkpoint=False)
    with workdir.held(tmp_path, restart=True) as again:
        assert again != aside
    assert set(os.listdir(again)) == expected


def test_epochs_without_a_checkpoint_are_not_written_over(tmp_path):
    leave_run(tmp_path, checkpoint=False)
    with workdir.held(tmp_path, restart=False) as aside:
        assert os.path.exists(os.path.join(aside, "metrics.jsonl"))


def test_a_run_with_a_checkpoint_stays(tmp_path):
    names = leave_run(tmp_path, checkpoint=True)
    with workdir.held(tmp_path, restart=False) as aside:
        assert aside == ""
    assert {p.name for p in tmp_path.iterdir()} == {*names, ".lock", "checkpoints"}


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--workdir .*file/run: cannot write in .*file"):
        workdir.choose(TrainConfig(workdir=tmp_path / "file" / "run"))


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    # As access() answers for anybody but root; root is told so on a read-only file system.
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)
    with pytest.raises(ConfigError, match=r"--workdir .*: cannot write in"):
        workdir.choose(TrainConfig(workdir=tmp_path / "run"))
