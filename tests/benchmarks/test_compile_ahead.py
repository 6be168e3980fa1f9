import importlib.util
import re

import pytest

from benchmarks import compile_ahead
from tests.helpers import finish, start
from training.config import TrainConfig
from training.errors import ConfigError

# 768 x 1024 and 1024 x 1000 parameters, and 16,384 examples on each of four devices.
PARAMETERS = 768 * 1024 + 1024 * 1000
SMALL = (
    "--topology v5e:2x2 --dataset synthetic_imagenet --image_size 16 --depth 2 --width 1024 "
    "--train_bs 65536"
)

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'"
)


def run(flags):
    out, err, code = finish(start("-m", "benchmarks.compile_ahead", *flags.split()))
    rows = dict(re.findall(r"^(\S+) +(.+)$", out, re.MULTILINE))
    return rows, err, code


@pytest.mark.parametrize("topology", ["v9:2x2", "h100", ""])
def test_topologies_that_are_not_known_are_refused(topology):
    with pytest.raises(ConfigError, match=f"--topology {topology}: unknown; give one of v4, v5e"):
        compile_ahead.chip_of(topology)


def test_a_missing_libtpu_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"^libtpu is missing.*: pip install 'jax\[tpu\]'"):
        compile_ahead.find_devices("v5e:2x2")


def test_the_time_is_that_of_what_takes_longest(capsys):
    config = TrainConfig(train_bs=1024)
    # A second of a v5e's arithmetic, two of its memory, half a second of its interconnect.
    sent = [compile_ahead.Collective("all-reduce", 10**9, 2, 100)]
    report = compile_ahead.Report(8 * 10**9, 197e12, 2 * 819e9, sent, 3)
    device = type("Device", (), {"device_kind": "TPU v5 lite"})
    options = compile_ahead.Options(config, "v5e:1x2")
    compile_ahead.print_report(options, compile_ahead.CHIPS["v5e"], [device] * 2, report)
    assert [re.split(" {2,}", line) for line in capsys.readouterr().out.splitlines()] == [
        ["devices", "2 x TPU v5 lite, v5e:1x2"],
        ["memory", "8.00 GB of 16 GB"],
        ["arithmetic", "197.000 TFLOP, 1000.00 ms"],
        ["moved", "1638.00 GB, 2000.00 ms"],
        ["all-reduce", "100, 100000.00 MB"],
        ["sent", "100000.00 MB, 500.00 ms"],
        ["roofline", "2000.00 ms a step, bound by memory: 512 images a second"],
        ["loops", "3, counted once in arithmetic and moved"],
    ]


@needs_libtpu
@pytest.mark.slow
def test_a_step_is_compiled_for_tpus():
    rows, err, code = run(SMALL)
    assert code == 0, err
    assert rows["devices"] == "4 x TPU v5 lite, v5e:2x2"
    # Each product once forward and for its kernel, that of the second layer for its input too.
    teraflops = 2 * 16_384 * (2 * PARAMETERS + 1024 * 1000) / 1e12
    assert float(rows["arithmetic"].split()[0]) == pytest.approx(teraflops, rel=0.05)
    # The gradients, and little else, in one.
    number, megabytes, _ = rows["all-reduce"].split()
    assert number == "1,"
    assert float(megabytes) == pytest.approx(4 * PARAMETERS / 1e6, rel=0.01)
    assert "all-gather" not in rows

    rows, err, code = run(f"{SMALL} --mesh fsdp=4")
    assert code == 0, err
    assert "all-gather" in rows


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--topology v5e:3x3", "--topology v5e:3x3: there is none (Topology layout"),
        ("--topology v5e:2x2 --mesh data=3", "--mesh data=3: takes 3 devices; make"),
        ("--topology v5e:2x2 --peer", "--peer: is resnet50 on imagenet"),
        (
            "--topology v5e:2x2 --depth 4 --width 65536",
            "--train_bs 128: does not fit into the memory of 4 x TPU v5 lite: ",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_one_line(flags, line):
    _, err, code = run(flags)
    assert code == 2
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1
