import os

import pytest

from training import workdir
from training.config import ConfigError, TrainConfig


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


def test_an_earlier_run_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"--workdir .*: holds an earlier run"):
        workdir.choose(TrainConfig(workdir=tmp_path))


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--workdir .*file/run: cannot write in .*file"):
        workdir.choose(TrainConfig(workdir=tmp_path / "file" / "run"))


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    # As access() answers for anybody but root; root is told so on a read-only file system.
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)
    with pytest.raises(ConfigError, match=r"--workdir .*: cannot write in"):
        workdir.choose(TrainConfig(workdir=tmp_path / "run"))
