"""A run that is interrupted and started again ends as if nothing had happened."""

import contextlib
import os
import random
import signal
import time

import pytest

from tests import chaos
from tests.helpers import (
    ROOT,
    finish,
    read_records,
    same,
    small_resnet18,
    start,
    untimed,
    wait_for_epochs,
)
from tests.images import write_tree
from training import signals
from training.config import TrainConfig
from training.errors import ConfigError
from training.run import train
from training.signals import Stopped

RESIDENT = {"epochs": 4, "depth": 3, "width": 16, "train_bs": 32, "platform": "cpu"}
STREAMED = {
    "dataset": "imagenet",
    "image_size": 16,
    "train_bs": 5,
    "test_bs": 4,
    "workers": 0,
}


class AfterSomeTime:
    """A request that comes when it has been asked after so many times."""

    def __init__(self, patience):
        self.patience = patience

    @property
    def signum(self):
        self.patience -= 1
        return signal.SIGTERM if self.patience < 0 else 0


def interrupt_after(monkeypatch, patience):
    def on_request():
        return contextlib.nullcontext(AfterSomeTime(patience))

    monkeypatch.setattr(signals, "on_request", on_request)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm": "spectral", "average": True},
        STREAMED,
        # Steps one by one, running averages.
        {
            "arch": "resnet18",
            "average": True,
            "depth": None,
            "width": None,
            "epochs": 4,
            "train_bs": 400,
        },
    ],
    ids=["resident", "spectral", "streamed", "convolutional"],
)
def test_interrupted_again_and_again(tmp_path, monkeypatch, fields):
    fields = RESIDENT | fields
    if fields.get("dataset") == "imagenet":
        fields["data_dir"] = str(write_tree(tmp_path / "imagenet", train=23, test=10))
    if fields.get("arch") == "resnet18":
        small_resnet18(monkeypatch)
    whole = train(TrainConfig(workdir=tmp_path / "whole", **fields))

    interruptions, config = 0, TrainConfig(workdir=tmp_path / "run", **fields)
    while True:
        # Longer and longer, so that all moments come and the end does too.
        interrupt_after(monkeypatch, patience=interruptions)
        try:
            result = train(config)
            break
        except Stopped:
            interruptions += 1
    assert interruptions >= 4
    assert same(result.state, whole.state)
    assert same(result.averaged, whole.averaged)
    assert untimed(result.records) == untimed(whole.records)
    assert read_records(tmp_path / "run") == [record.to_json() for record in result.records]


@pytest.mark.slow
def test_more_epochs_go_on_from_the_end(tmp_path):
    whole = train(TrainConfig(workdir=tmp_path / "whole", **RESIDENT))
    for epochs in (1, 3, 4, 4):
        fields = RESIDENT | {"epochs": epochs}
        result = train(TrainConfig(workdir=tmp_path / "run", **fields))
        assert len(result.records) == epochs
    assert same(result.state, whole.state)
    assert untimed(result.records) == untimed(whole.records)


def test_fewer_epochs_than_there_were_are_refused(tmp_path):
    train(TrainConfig(workdir=tmp_path, **(RESIDENT | {"epochs": 2})))
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(
        ConfigError, match=r"--epochs 1: .* is in epoch 2 already; give --epochs 2 or"
    ):
        train(TrainConfig(workdir=tmp_path, **(RESIDENT | {"epochs": 1})))
    assert (tmp_path / "config.json").read_text() == before


def test_what_was_logged_after_the_checkpoint_is_logged_once(tmp_path):
    config = TrainConfig(workdir=tmp_path, **RESIDENT)
    result = train(config)
    metrics = tmp_path / "metrics.jsonl"
    complete = metrics.read_text()
    # As a killed process may leave it.
    metrics.write_text(complete + '{"epoch": 5, "st')
    assert untimed(train(config).records) == untimed(result.records)
    assert metrics.read_text() == complete


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    seed = random.SystemRandom().randrange(1000)
    flags = [*chaos.RESIDENT.split(), "--epochs", "20"]
    kills, same = chaos.chaos(tmp_path, flags, runs=1, kills=6, rng=random.Random(seed))
    assert same == 1, f"seed {seed}, {kills}"
    assert kills, f"seed {seed}: none was killed"


def start_run(workdir, *flags, **kwargs):
    small = ["--platform", "cpu", "--depth", "3", "--width", "16"]
    return start(ROOT / "train.py", *small, "--workdir", workdir, *flags, **kwargs)


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_is_answered_by_saving(tmp_path, signum, code):
    process = start_run(tmp_path, "--epochs", 100_000)
    wait_for_epochs(tmp_path)
    process.send_signal(signum)
    _, err, ended = finish(process)
    assert ended == code
    last = err.splitlines()[-1]
    assert last.startswith(f"stopped: {signal.Signals(signum).name} after step ")
    step = int(last.split("step ")[1].split(";")[0])
    assert last.endswith(f"--workdir {tmp_path}, and without --restart, goes on from there")
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    assert "Traceback" not in err

    epochs = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    process = start_run(tmp_path, "--epochs", epochs + 1)
    out, err, code = finish(process)
    assert code == 0, err
    assert f"resumed   after step {step:,}, with {epochs} epochs done" in out


SIGNALS = """
import signal
from training import signals

before = signal.getsignal(signal.SIGINT)
with signals.on_request() as request:
    pass
assert signal.getsignal(signal.SIGINT) is before
with signals.on_request() as request:
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(signum)
        assert request.signum == signal.SIGTERM
    signal.raise_signal(signal.SIGINT)
print("goes on")
"""


@pytest.mark.parametrize("before", ["pass", "os.close(1)"], ids=["", "without standard output"])
def test_a_second_interrupt_ends_at_once(before):
    python = f"os.execv(sys.executable, [sys.executable, '-c', {SIGNALS!r}])"
    out, err, code = finish(start("-c", f"import os, sys; {before}; {python}", cwd=ROOT))
    expected = "saving after this step; Ctrl-C again ends at once\n"
    assert (out, err, code) == ("", expected, 130)


@pytest.mark.slow
def test_a_workdir_that_is_moved_away_is_said(tmp_path):
    process = start_run(tmp_path / "run", "--epochs", 100_000)
    wait_for_epochs(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    process.send_signal(signal.SIGTERM)
    _, err, code = finish(process)
    assert code == 1
    folder = tmp_path / "run" / "checkpoints"
    assert err.splitlines()[-1] == f"stopped: cannot save in {folder}: No such file or directory"
    assert "Traceback" not in err


@pytest.mark.slow
def test_two_runs_do_not_share_a_workdir(tmp_path):
    start_run(tmp_path, "--epochs", 100_000)
    wait_for_epochs(tmp_path)
    _, err, code = finish(start_run(tmp_path, "--epochs", 100_000))
    assert code == 2
    assert err == f"error: --workdir {tmp_path}: another run is using it; give another\n"


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.5, 2.2, 2.6, 3, 4])
def test_a_signal_at_the_start_ends_it_soon(tmp_path, seconds):
    process = start_run(tmp_path, "--epochs", 100_000)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    _, err, code = finish(process, timeout=20)
    # Before the handlers are there, the system ends it.
    assert code in (143, -signal.SIGTERM)
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_the_workers_alone(tmp_path):
    tree = write_tree(tmp_path / "imagenet", train=400, test=10)
    flags = "--dataset imagenet --image_size 16 --train_bs 5 --test_bs 5 --workers 2 --epochs 1000"
    flags = [*flags.split(), "--data_dir", tree, "--width", 16]
    process = start_run(tmp_path / "run", *flags, start_new_session=True)
    wait_for_epochs(tmp_path / "run")
    os.killpg(process.pid, signal.SIGTERM)
    _, err, code = finish(process)
    assert code == 143, err
    assert "stopped: SIGTERM after step " in err
    assert "Traceback" not in err
