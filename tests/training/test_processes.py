import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pictures import write_tree
from training import processes, workdir
from training.config import ConfigError

ROOT = Path(__file__).parents[2]
FLAGS = "--platform cpu --epochs 2 --depth 3 --width 32 --train_bs 16 --test_bs 8"


def start(devices, *flags):
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, ROOT / "train.py", *FLAGS.split(), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, **pipes)


def finish(process):
    try:
        return *process.communicate(timeout=120), process.returncode
    finally:
        process.kill()


def start_two(*flags):
    """Two processes of four devices each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    meet = lambda i: ("--coordinator", address, "--num_processes", 2, "--process_id", i)
    return [start(4, *flags, *meet(i)) for i in range(2)]


def run_two(*flags):
    """What each of the two wrote, and its exit code."""
    return [finish(process) for process in start_two(*flags)]


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--dataset", "imagenet", "--image_size", 16, "--workers", 1),
        ("--mesh", "data=2,fsdp=4"),
    ],
    ids=["streamed", "resident"],
)
def test_two_processes_train_as_one_does(tmp_path, flags):
    if "imagenet" in flags:
        flags += ("--data_dir", write_tree(tmp_path / "imagenet", train=40, test=11))
    (out, err, code), (other_out, other_err, other_code) = run_two(
        *flags, "--workdir", tmp_path / "two"
    )
    assert (code, other_code) == (0, 0), err + other_err
    assert "devices   8 x cpu (cpu) of 2 processes" in out
    # Gloo announces its connections there, from several threads of C++; we say nothing.
    assert not any(word in other_out for word in ("devices", "compiled", "epoch", "metrics"))
    assert {p.name.split(".")[0] for p in (tmp_path / "two").iterdir()} == {
        "",  # .lock
        "checkpoints",
        "config",
        "metrics",
        "curves",
        "events",
    }

    *_, code = finish(start(8, *flags, "--workdir", tmp_path / "one"))
    assert code == 0
    for one, two in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        for name in ("train_loss", "test_loss", "eta", "gradient_summary"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), name
        assert two["test_accuracy"] == one["test_accuracy"]


def test_what_the_first_process_refuses_ends_all(tmp_path):
    with workdir.held(tmp_path, restart=False):
        for _, err, code in run_two("--workdir", tmp_path):
            assert code == 2
            assert f"error: --workdir {tmp_path}: another run is using it" in err


def wait_for_epochs(folder, epochs=1):
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= epochs):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_killed_ends_the_others_and_all_can_go_on(tmp_path, lost):
    flags = ("--workdir", tmp_path / "run", "--save_every", "20steps")
    both = start_two(*flags, "--epochs", 100_000)
    wait_for_epochs(tmp_path / "run")
    both[lost].kill()
    killed = time.monotonic()
    _, err, code = finish(both[1 - lost])
    finish(both[lost])
    assert time.monotonic() - killed < 60
    assert code != 0
    assert f"process {lost} of 2 is lost" in err

    saved = max(
        int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("*") if p.name.isdigit()
    )
    epochs = saved // 89 + 1
    (out, err, code), (_, _, other_code) = run_two(*flags, "--epochs", epochs)
    assert (code, other_code) == (0, 0), err
    assert f"resumed   after step {saved:,}, with {saved // 89} epochs done" in out
    assert len(records(tmp_path / "run")) == epochs


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_in_good_order(tmp_path):
    both = start_two("--workdir", tmp_path / "run", "--epochs", 100_000)
    wait_for_epochs(tmp_path / "run")
    both[1].send_signal(signal.SIGTERM)
    for _, err, code in map(finish, both):
        assert code == 143, err
        (line,) = (line for line in err.splitlines() if line.startswith("stopped: "))
        assert line.startswith("stopped: SIGTERM after step ")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["one", "two"])
def test_checkpoints_are_read_by_as_many_processes_as_there_are(tmp_path, first):
    """Parameters in eight shares are written by one process and read by two, or the reverse."""
    flags = ("--workdir", tmp_path / "run", "--mesh", "fsdp=8")
    one = lambda *more: [finish(start(8, *flags, *more))]
    two = lambda *more: run_two(*flags, *more)
    stages = {"one": (one, two), "two": (two, one)}[first]
    for run, epochs in zip(stages, (1, 2), strict=True):
        for _, err, code in run("--epochs", epochs):
            assert code == 0, err
    *_, code = finish(start(8, "--workdir", tmp_path / "whole", "--mesh", "fsdp=8"))
    assert code == 0
    whole, resumed = records(tmp_path / "whole"), records(tmp_path / "run")
    for one, other in zip(whole, resumed, strict=True):
        for name in ("train_loss", "test_loss", "eta", "gradient_summary"):
            assert other[name] == pytest.approx(one[name], rel=1e-5), name


def test_one_process_decides_for_itself():
    assert processes.decide(lambda: "here") == "here"

    def refuse():
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        processes.decide(refuse)
