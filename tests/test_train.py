"""The command line, as a user has it."""

import fcntl
import importlib.util
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pyte
import pytest

from tests.helpers import ROOT, free_address

COORDINATOR = ["--num_processes", "2", "--process_id", "1", "--coordinator"]


def train(*flags, **kwargs):
    command = [sys.executable, ROOT / "train.py", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def test_help_has_every_flag_in_a_line_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['train.py', '--help']\n"
        "import train\n"
        "try: train.main()\n"
        "except SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    flags = (
        "arch dataset loss train_bs test_bs epochs depth width norm gain seed data_dir workdir "
        "platform precision save_every keep restart verbose eval_only"
    )
    for flag in flags.split():
        assert re.search(rf"--{flag}[,\s│]+\S", run.stdout), flag
    heavy = {"jax", "flax", "optax", "numpy", "matplotlib", "tensorflow_datasets", "sklearn"}
    assert not heavy & set(run.stderr.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "resnext"], "error: --arch resnext: unknown; choose from "),
        (["--dataset", "sv\nhn"], "error: --dataset sv hn: unknown; choose from digits, "),
        (["--train_bs", "5000"], "error: --train_bs 5000: larger than the training set of digits"),
        (
            ["--workdir", "/dev/null/run"],
            "error: --workdir /dev/null/run: cannot write in /dev/null",
        ),
        (["--workdir", "~nobody-of-this-name/run"], "error: --workdir ~nobody-of-this-name/run: "),
        (["--workdir", "x" * 300], f"error: --workdir {'x' * 300}: File name too long"),
        (["--width", "0"], "error: --width 0: must be at least 1"),
        (["--epochs", "-1"], "error: --epochs -1: must be at least 1"),
        (["--platform", "gpu"], "error: --platform gpu: JAX finds no such device"),
        (
            ["--epochs", "ten"],
            "error: --epochs: invalid literal for int() with base 10: 'ten'; see",
        ),
        (
            ["--epoch", "3"],
            "error: Unrecognized options: --epoch, 3; perhaps --epochs INT was meant",
        ),
        (["--workdir", ""], "error: --workdir: an empty name is no folder"),
        (["--data_dir", "x"], "error: --data_dir x: digits is read from no folder"),
        (["--dataset", "mnist", "--data_dir", ""], "error: --data_dir: an empty name is no folder"),
        (
            ["--dataset", "mnist", "--data_dir", __file__],
            f"error: --data_dir {__file__}: is a file",
        ),
        (["--dataset", "imagenet", "--data_dir", __file__], "error: --data_dir "),
        (["--arch", "vgg16", "--depth", "20"], "error: --depth 20: is for fcn, not for vgg16"),
        (["--arch", "resnet18", "--width", "9"], "error: --width 9: is for fcn, not for resnet18"),
        (
            [*COORDINATOR, "localhost"],
            "error: --coordinator localhost: give a host and a port, as in",
        ),
        ([*COORDINATOR, ""], "error: --coordinator : give a host and a port"),
        (
            [*COORDINATOR, "localhost:99999"],
            "error: --coordinator localhost:99999: give a host and",
        ),
    ],
)
def test_wrong_flags_are_answered_in_one_line(tmp_path, flags, message):
    run = train(*flags, cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith(message)
    assert run.stderr.count("\n") == 1
    assert run.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_an_error_of_the_parser_is_the_same_in_any_encoding(encoding):
    run = train("--epochs", "ten", env=os.environ | {"PYTHONIOENCODING": encoding})
    message = "error: --epochs: invalid literal for int() with base 10: 'ten'; see --help\n"
    assert (run.returncode, run.stderr) == (2, message)


def test_data_that_is_nowhere_to_be_had_is_one_line_too(tmp_path):
    # No network, to this program: a proxy that nobody answers at.
    env = os.environ | {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}
    run = train("--dataset", "cifar100", "--data_dir", tmp_path / "none", env=env, timeout=30)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: --dataset cifar100: not prepared in {tmp_path}")
    assert "run `./run prepare cifar100 --data_dir DIR`" in run.stderr
    assert run.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_one_line_too(tmp_path):
    run = train("--gain", "1e30", "--workdir", tmp_path / "run")
    assert run.returncode == 1
    assert re.fullmatch(
        r"stopped: the loss was (nan|inf) at step \d+ \(epoch 1\), after an eta of [\d.]+; "
        r"there is no checkpoint before it\n",
        run.stderr,
    )


@pytest.mark.parametrize("together", [False, True], ids=["one process", "--distribute"])
def test_a_platform_of_the_environment_that_is_not_there_is_one_line_too(tmp_path, together):
    env = os.environ | {"JAX_PLATFORMS": "cuda"}
    flags = ["--coordinator", free_address(), "--num_processes", "1", "--process_id", "0"]
    run = train(*(flags if together else []), cwd=tmp_path, env=env, timeout=60)
    assert run.returncode == 2
    assert run.stderr.startswith(
        "error: JAX_PLATFORMS=cuda: JAX finds no such device; leave it out"
    )
    assert run.stderr.count("\n") == 1


PLUGIN = """
from jax._src import hardware_utils, xla_bridge
from jax._src.lib import xla_client

def initialize():
    hardware_utils.has_visible_nvidia_gpu = lambda: True
    xla_bridge.register_backend_factory("{name}", xla_client.make_cpu_client, priority=500)
"""


def install_plugin(folder, name, source):
    """Installs a plugin of JAX; returns the environment that has it."""
    package = folder / "jax_plugins" / f"xla_{name}9"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(source)
    about = folder / "plugin-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        f"[jax_plugins]\nxla_{name}9 = jax_plugins.xla_{name}9\n"
    )
    return os.environ | {"PYTHONPATH": os.fspath(folder)}


@pytest.mark.slow
def test_a_plugin_that_finds_no_device_is_one_line_too(tmp_path):
    """As NVIDIA's does where no GPU is visible; JAX goes on without it."""
    source = "def initialize():\n    raise RuntimeError('CUDA_ERROR_NO_DEVICE')\n"
    env = install_plugin(tmp_path, "cuda", source)
    run = train("--epochs", "1", "--workdir", tmp_path / "run", env=env, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(
        r"Jax plugin configuration error: .*xla_cuda9.*: CUDA_ERROR_NO_DEVICE\n", run.stderr
    )


FULL = """
import sys
import train
from training import run
from jax.errors import JaxRuntimeError

def fill(config):
    raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes.\\nand so on")

run.train = fill
sys.exit(train.main())
"""


def test_a_device_whose_memory_is_full_is_one_line_too():
    run = subprocess.run([sys.executable, "-c", FULL], cwd=ROOT, capture_output=True, text=True)
    message = (
        "stopped: out of memory on a device; give a smaller --train_bs or --test_bs, or more "
        "devices (RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes.)\n"
    )
    assert (run.returncode, run.stderr) == (1, message)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cuda", "rocm"])
def test_platform_gpu_is_the_kind_that_is_installed(tmp_path, name):
    """A plugin as NVIDIA's or AMD's registers itself, with a CPU behind it."""
    env = install_plugin(tmp_path, name, PLUGIN.format(name=name))
    flags = ["--platform", "gpu", "--epochs", "1", "--workdir", tmp_path / "run"]
    run = train(*flags, env=env, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "devices   1 x cpu" in run.stdout


@pytest.mark.slow
def test_a_run_outlives_whoever_reads_its_output(tmp_path):
    command = f"{sys.executable} {ROOT / 'train.py'} --epochs 3 --workdir run | head -n 1"
    run = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0
    assert run.stdout == "devices   1 x cpu (cpu)\n"
    expected = "nobody reads standard output any more; the run goes on without it\n"
    assert run.stderr == expected
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 3


class Screens(list):
    """Every screen that was shown, as its lines, and whether the cursor is hidden at the end."""

    cursor_hidden = False


# Makes the terminal that of the process, so that its Ctrl-C is a signal to it.
ON_ITS_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def on_a_terminal(*flags, columns=80, interrupt_at=None, cwd=None):
    """Runs on a terminal, and presses Ctrl-C when it shows what is to be waited for.

    Returns:
      The exit code, and :class:`Screens`.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", ON_ITS_TERMINAL, ROOT / "train.py", *map(str, flags)],
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        start_new_session=True,
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"TERM": "xterm-256color"},
    )
    os.close(theirs)
    screen = pyte.Screen(columns, 60)
    stream, screens = pyte.ByteStream(screen), Screens()
    while True:
        try:
            stream.feed(os.read(ours, 65536))
        except OSError:  # The other end is closed.
            return process.wait(), screens
        screens.cursor_hidden = screen.cursor.hidden
        screens.append([line.rstrip() for line in screen.display if line.strip()])
        if interrupt_at and any(interrupt_at in line for line in screens[-1]):
            interrupt_at = None
            os.write(ours, b"\x03")


BAR = re.compile(
    r"epoch [1-4]/4 ━.* loss \d\.\d{4}  acc [\d.]+%  eta \d\.\d{4}  [\d,]+ img/s \d:\d\d:\d\d"
)
ROW = re.compile(r" +\d+( +\d\.\d{4} +[\d.]+%){2} +\d\.\d{4}  \d\.\d{4}-\d\.\d{4} +[\d,]+")


@pytest.mark.slow
def test_a_terminal_of_eighty_columns_is_wide_enough(tmp_path):
    flags = ["--epochs", "4", "--train_bs", "4", "--depth", "4", "--workdir", "run"]
    code, screens = on_a_terminal(*flags, cwd=tmp_path)
    assert code == 0
    assert any(line.startswith("compiling ━") for screen in screens for line in screen)
    assert any(BAR.fullmatch(line) for screen in screens for line in screen)
    last = screens[-1]
    assert sum(bool(ROW.fullmatch(line)) for line in last) == 4
    (heading,) = (line for line in last if line.startswith("epoch  train loss"))
    assert len(heading) < 80
    assert not any("━" in line for line in last)
    (checkpoints,) = (line for line in last if "checkpoints" in line)
    assert "1436 (" in checkpoints
    assert last[-1].startswith(("metrics", "dashboard"))
    assert ("dashboard" in last[-1]) == bool(importlib.util.find_spec("tensorboard"))


def test_ctrl_c_while_it_compiles_brings_the_cursor_back(tmp_path):
    flags = ["--depth", "60", "--workdir", tmp_path / "run"]
    code, screens = on_a_terminal(*flags, interrupt_at="compiling ━")
    assert code == 130
    assert screens[-1][-1] == "stopped: SIGINT"
    assert not any("━" in line for line in screens[-1])
    assert not screens.cursor_hidden


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, pytest.param(120, marks=pytest.mark.slow)])
def test_ctrl_c_leaves_no_bar_behind(tmp_path, columns):
    flags = ["--epochs", "10000", "--train_bs", "4", "--workdir", tmp_path / "run"]
    code, screens = on_a_terminal(*flags, columns=columns, interrupt_at="img/s")
    assert code == 130
    assert "saving after this step; Ctrl-C again ends at once" in screens[-1]
    assert not any("img/s" in line for line in screens[-1])
    assert any(line.startswith("stopped: SIGINT after step ") for line in screens[-1])
