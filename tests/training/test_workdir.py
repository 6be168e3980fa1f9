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


@pytest.mark.parametrize("name", ["width=[16,16]", "what?", "gs://bucket/all*"])
def test_a_name_under_which_checkpoints_would_be_lost_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"which Orbax takes for a pattern"):
        workdir.choose(TrainConfig(workdir=name))
    with pytest.raises(ConfigError, match=r"which Orbax takes for a pattern"):
        workdir.located(name)


def test_nor_may_the_folder_above_have_such_a_name(tmp_path, monkeypatch):
    folder = tmp_path / "lr=[1,2]"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"^runs/.*: has \[ in its name or above it"):
        workdir.choose(TrainConfig())


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("~nosuchuser/run", "the home folder of that user is unknown"),
        ("/tmp/" + 300 * "a", "File name too long"),
    ],
)
def test_a_folder_that_cannot_be_looked_for_is_said(path, reason):
    for find in (lambda p: workdir.choose(TrainConfig(workdir=p)), workdir.located):
        with pytest.raises(ConfigError, match=f"{path}: {reason}$"):
            find(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
def test_a_folder_that_may_not_be_looked_into_is_said(tmp_path):
    shut = tmp_path / "shut"
    shut.mkdir(mode=0)
    for find in (lambda p: workdir.choose(TrainConfig(workdir=p)), workdir.located):
        with pytest.raises(ConfigError, match=f"{shut}/run: Permission denied$"):
            find(shut / "run")


def test_choosing_makes_nothing(tmp_path):
    workdir.choose(TrainConfig(workdir=tmp_path / "a" / "b"))
    assert not list(tmp_path.iterdir())


def test_a_second_run_is_kept_out_until_the_first_has_ended(tmp_path):
    folder = tmp_path / "a" / "b"
    with (
        workdir.held(folder),
        pytest.raises(ConfigError, match=r"--workdir .*: another run is using it"),
        workdir.held(folder),
    ):
        pass
    with workdir.held(folder):
        pass


def test_a_token_is_found_where_it_is_left_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "SEEN_SECONDS", 0.2)
    ours, other = tmp_path / "ours", tmp_path / "other"
    for folder in (ours, other):
        folder.mkdir()
    with workdir.token(ours) as name:
        workdir.find_token(ours, name)
        with pytest.raises(ConfigError, match=rf"--workdir {other}: on \S+ this is not the folder"):
            workdir.find_token(other, name)
    assert not list(ours.iterdir())


def leave_run(folder, checkpoint):
    names = ["config.json", "metrics.jsonl", "curves.png", "events.out.tfevents.1", "mine.txt"]
    for name in names:
        (folder / name).write_text("line")
    if checkpoint:
        (folder / "checkpoints" / "11").mkdir(parents=True)
    return names


def test_beginning_afresh_sets_the_earlier_run_aside_and_nothing_else(tmp_path):
    leave_run(tmp_path, checkpoint=True)
    aside = workdir.set_aside(tmp_path, restart=True)
    assert {p.name for p in tmp_path.iterdir()} == {"mine.txt", os.path.basename(aside)}
    expected = {"config.json", "metrics.jsonl", "curves.png", "events.out.tfevents.1"}
    assert set(os.listdir(aside)) == expected | {"checkpoints"}
    # Once more, within the same second.
    leave_run(tmp_path, checkpoint=False)
    again = workdir.set_aside(tmp_path, restart=True)
    assert again != aside
    assert set(os.listdir(again)) == expected


def test_epochs_without_a_checkpoint_are_not_written_over(tmp_path):
    leave_run(tmp_path, checkpoint=False)
    aside = workdir.set_aside(tmp_path, restart=False)
    assert os.path.exists(os.path.join(aside, "metrics.jsonl"))


def test_a_run_with_a_checkpoint_stays(tmp_path):
    names = leave_run(tmp_path, checkpoint=True)
    aside = workdir.set_aside(tmp_path, restart=False)
    assert aside == ""
    assert {p.name for p in tmp_path.iterdir()} == {*names, "checkpoints"}


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--workdir .*file/run: cannot write in .*file"):
        workdir.choose(TrainConfig(workdir=tmp_path / "file" / "run"))


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    # As access() answers for anybody but root; root is told so on a read-only file system.
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)
    with pytest.raises(ConfigError, match=r"--workdir .*: cannot write in"):
        workdir.choose(TrainConfig(workdir=tmp_path / "run"))
