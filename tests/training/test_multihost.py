import os
import re
import signal
import socket
import time
from typing import NamedTuple

import pytest

from tests.helpers import ROOT, finish, free_address, read_records, start, wait_for_epochs
from tests.images import write_tree
from training import multihost, workdir
from training.config import ConfigError

FLAGS = "--platform cpu --epochs 2 --depth 3 --width 48 --train_bs 24 --test_bs 24"
STREAMED = "--dataset imagenet --image_size 16 --workers 1"


class Layout(NamedTuple):
    """Processes that train together, and on what.

    Attributes:
      processes: how many.
      devices: of each of them.
      streamed: whether on a tree of JPEGs, of two batches; else on digits, of 59.
      mesh: how all devices share the work.
    """

    processes: int
    devices: int
    streamed: bool
    mesh: str

    @property
    def total(self):
        return self.processes * self.devices

    @property
    def steps(self):
        return 2 if self.streamed else 59

    def flags(self, tmp_path):
        flags = ("--mesh", self.mesh)
        if self.streamed:
            tree = tmp_path / "imagenet"
            tree = tree if tree.exists() else write_tree(tree, train=50, test=11)
            flags += (*STREAMED.split(), "--data_dir", tree)
        return flags

    def commands(self, *flags):
        """The flags of each process."""
        meet = ("--coordinator", free_address(), "--num_processes", self.processes, "--process_id")
        return [(*flags, *meet, i) for i in range(self.processes)]

    def start(self, *flags):
        return [train(self.devices, *own) for own in self.commands(*flags)]

    def run(self, *flags):
        """What each of them wrote, and its exit code."""
        return list(map(finish, self.start(*flags)))

    def alone(self, *flags):
        """The same of one process that has all the devices."""
        return [finish(train(self.total, *flags))]


# All pairs: two or three processes, one device each or several, resident or streamed.
LAYOUTS = [
    pytest.param(Layout(2, 1, False, "fsdp=2"), id="2x1-resident"),
    # The third of a batch in the middle is on devices of both.
    pytest.param(Layout(2, 3, True, "fsdp=3,model=2"), id="2x3-streamed"),
    pytest.param(Layout(3, 1, True, "data=3"), id="3x1-streamed"),
    pytest.param(Layout(3, 2, False, "data=3,fsdp=2"), id="3x2-resident"),
]
everywhere = pytest.mark.parametrize("layout", LAYOUTS)
# Of two processes, with one device each and with several, which take different paths.
with_two = pytest.mark.parametrize("layout", LAYOUTS[:2])


def train(devices, *flags, cwd=None):
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return start(ROOT / "train.py", *FLAGS.split(), *flags, env=env, cwd=cwd)


ON_CORES = """
import os, sys
from input_pipeline import cores
from training import multihost
from training.config import TrainConfig

coordinator, process_id, core = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if core != "all":
    os.sched_setaffinity(0, {int(core)})
multihost.initialize(TrainConfig(
    distribute=True, coordinator=coordinator, num_processes=3, process_id=process_id
))
print(multihost.count_alike("host"), multihost.count_alike("host", cores.affinity()))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
def test_processes_share_the_cores_that_they_may_both_use():
    one, *_ = os.sched_getaffinity(0)
    address = free_address()
    cores = ("all", one, "all")
    started = [start("-c", ON_CORES, address, i, which, cwd=ROOT) for i, which in enumerate(cores)]
    counts = [out.splitlines()[-1] for out, _, _ in map(finish, started)]
    several = len(os.sched_getaffinity(0)) > 1
    expected = ["3 2", "3 1", "3 2"] if several else ["3 3", "3 3", "3 3"]
    assert counts == expected


GPUS = """
import jax
from training import multihost
from training.config import TrainConfig

multihost.initialize(TrainConfig(distribute=True))
print(jax.config.read("jax_cuda_visible_devices"))
"""


def told_by_slurm(i, nodes):
    told = {"JOB_ID": 1, "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": i}
    told |= {"LOCALID": i if nodes == 1 else 0, "STEP_NUM_TASKS": 2, "STEP_NUM_NODES": nodes}
    return {f"SLURM_{name}": str(value) for name, value in told.items()}


def told_by_open_mpi(i, nodes):
    told = {"SIZE": 2, "RANK": i, "LOCAL_SIZE": 2 // nodes, "LOCAL_RANK": i if nodes == 1 else 0}
    env = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in told.items()}
    return env | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1"}


@pytest.mark.slow
@pytest.mark.parametrize("told", [told_by_slurm, told_by_open_mpi])
@pytest.mark.parametrize(
    ("nodes", "own", "expected"),
    [(1, {}, ["0", "1"]), (2, {}, ["all", "all"]), (2, {"JAX_LOCAL_DEVICE_IDS": "3"}, ["3", "3"])],
    ids=["two on a host", "one on each of two", "told which"],
)
def test_a_process_that_is_alone_on_its_host_drives_all_gpus(told, nodes, own, expected):
    env = os.environ | {"JAX_COORDINATOR_PORT": free_address().rpartition(":")[2]} | own
    started = [start("-c", GPUS, cwd=ROOT, env=env | told(i, nodes)) for i in range(2)]
    ended = list(map(finish, started))
    assert [out.strip() for out, *_ in ended] == expected, ended


POD = """
import sys
from training import multihost
from training.config import TrainConfig

told = {"coordinator": sys.argv[1], "num_processes": 1, "process_id": 0}
multihost.initialize(TrainConfig(distribute=True, **told))
"""


def test_a_pod_that_is_told_everything_asks_nothing_of_kubernetes():
    env = os.environ | {"KUBERNETES_SERVICE_HOST": "localhost"}
    assert finish(start("-c", POD, free_address(), cwd=ROOT, env=env)) == ("", "", 0)


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
@everywhere
def test_several_processes_train_as_one_does_and_read_what_it_wrote(tmp_path, layout):
    """And the reverse: where data are streamed, the several train the first epoch."""
    flags, many = layout.flags(tmp_path), ("--workdir", tmp_path / "many")
    stages = [(layout.alone, 1), (layout.run, 2)]
    if layout.streamed:
        stages = [(layout.run, 1), (layout.alone, 2)]
    outputs = [run(*flags, *many, "--epochs", epochs) for run, epochs in stages]
    for _, err, code in (process for output in outputs for process in output):
        assert code == 0, err
    (out, err, _), *others = max(outputs, key=len)
    assert f"devices   {layout.total} x cpu (cpu) of {layout.processes} processes" in out
    assert re.search(rf"^process 0 of {layout.processes}: .* {layout.devices} devices$", err, re.M)
    for number, (other_out, other_err, _) in enumerate(others, start=1):
        assert f"process {number} of {layout.processes}: " in other_err
        # Gloo announces its connections there, from several threads of C++; we say nothing.
        assert not any(word in other_out for word in ("devices", "compiled", "epoch", "metrics"))
    assert {p.name.split(".")[0] for p in (tmp_path / "many").iterdir()} == {
        "",  # .lock
        "checkpoints",
        "config",
        "metrics",
        "curves",
        "events",
    }

    ((_, err, code),) = layout.alone(*flags, "--workdir", tmp_path / "one")
    assert code == 0, err
    for ours, theirs in zip(
        read_records(tmp_path / "many"), read_records(tmp_path / "one"), strict=True
    ):
        for name in ("train_loss", "test_loss", "eta", "gradient_summary"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
        assert ours["test_accuracy"] == theirs["test_accuracy"]

    flags = [*STREAMED.split()[4:], "--eval_only"] if layout.streamed else ["--eval_only"]
    (out, err, code), *_ = layout.run(*flags, *many)
    assert code == 0, err
    last = read_records(tmp_path / "many")[-1]
    assert re.search(rf"last +{last['step']} +2 +{last['test_loss']:.4f} ", out)


def all_refuse(outputs, pattern):
    """Whether all processes end, and say the same of what is amiss in one of them."""
    for _, err, code in outputs:
        assert code == 2, err
        assert re.search(rf"^error: {pattern}$", err, re.M), err
        assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
@with_two
def test_processes_that_are_told_different_things_say_so(tmp_path, layout):
    *first, last = layout.commands(*layout.flags(tmp_path), "--workdir", tmp_path / "run")
    started = [train(layout.devices, *own) for own in (*first, (*last, "--seed", 7))]
    message = f"--seed: 7 in process {layout.processes - 1} and 0 in process 0; all need the same"
    all_refuse(map(finish, started), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("own", ["--eval_only", "--epochs 7", "--save_every 5steps"])
def test_no_process_is_told_another_thing_than_the_first(tmp_path, own):
    layout = Layout(2, 1, streamed=False, mesh="data=2")
    first, last = layout.commands("--workdir", tmp_path / "run")
    started = [train(1, *first), train(1, *last, *own.split())]
    all_refuse(map(finish, started), f"{own.split()[0]}: .* in process 1 and .* in process 0; .*")


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
def test_each_process_may_have_a_number_of_workers_of_its_own(tmp_path):
    tree = write_tree(tmp_path / "imagenet", train=50, test=11)
    flags = ("--dataset", "imagenet", "--image_size", 16, "--data_dir", tree)
    layout = Layout(2, 1, streamed=True, mesh="data=2")
    first, last = layout.commands(*flags, "--workdir", tmp_path / "run")
    for _, err, code in map(finish, [train(1, *first), train(1, *last, "--workers", 0)]):
        assert code == 0, err


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda tree: next(tree.glob("train/*/*")).unlink(),
            "training images: 49 in process 1 and 50",
        ),
        (
            lambda tree: (file := next(tree.glob("val/*/*"))).rename(file.with_name("z.JPEG")),
            r"fingerprint of the test images: \d+ in process 1 and \d+",
        ),
        (lambda tree: (tree / "val").rename(tree / "elsewhere"), "(process 1: )?--data_dir .*"),
    ],
    ids=["an image", "a name", "a split"],
)
def test_processes_that_have_different_data_say_so(tmp_path, damage, message):
    layout = Layout(2, 1, streamed=True, mesh="data=2")
    trees = [write_tree(tmp_path / str(i), train=50, test=11) for i in range(2)]
    damage(trees[1])
    commands = layout.commands(*STREAMED.split(), "--workdir", tmp_path / "run")
    started = [
        train(1, *flags, "--data_dir", tree) for flags, tree in zip(commands, trees, strict=True)
    ]
    all_refuse(map(finish, started), f"{message}.*")


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
@with_two
def test_what_the_first_process_refuses_ends_all(tmp_path, layout):
    with workdir.held(tmp_path):
        for _, err, code in layout.run("--workdir", tmp_path):
            assert code == 2
            assert f"error: --workdir {tmp_path}: another run is using it" in err


@pytest.fixture
def hosts(tmp_path):
    """A folder for each of two processes, as hosts have that share no file system."""
    folders = [tmp_path / f"host{i}" for i in range(2)]
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
def test_a_workdir_that_not_all_see_ends_all_before_they_train(hosts):
    """The same name in every process, as a relative one has in other folders."""
    (run := hosts[0] / "run").mkdir()
    (run / "metrics.jsonl").write_text("an earlier run's")
    layout = Layout(2, 1, streamed=False, mesh="data=2")
    commands = layout.commands("--workdir", "run", "--restart")
    started = [train(1, *own, cwd=host) for own, host in zip(commands, hosts, strict=True)]
    all_refuse(
        map(finish, started), r"(process 1: )?--workdir run: on \S+ this is not the folder .*"
    )
    assert {p.name for p in run.iterdir()} == {".lock", "metrics.jsonl"}
    assert not any(hosts[1].iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
def test_what_not_all_see_is_not_evaluated(hosts):
    layout = Layout(2, 1, streamed=False, mesh="data=2")

    def evaluate():
        commands = layout.commands("--workdir", "run", "--eval_only")
        started = [train(1, *own, cwd=host) for own, host in zip(commands, hosts, strict=True)]
        return map(finish, started)

    for seed, (host, message) in enumerate(
        [
            (hosts[0], r"(process 1: )?run: holds no checkpoint"),
            (hosts[1], "last checkpoint of --workdir: .* in process 1 and .*; all need the same"),
        ]
    ):
        _, err, code = finish(train(1, "--workdir", host / "run", "--seed", seed))
        assert code == 0, err
        all_refuse(evaluate(), message)


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
@with_two
def test_a_process_that_is_killed_ends_the_others_and_all_can_go_on(tmp_path, layout):
    lost = 0 if layout.devices > 1 else -1
    flags = (*layout.flags(tmp_path), "--workdir", tmp_path / "run", "--save_every", "20steps")
    started = layout.start(*flags, "--epochs", 100_000)
    wait_for_epochs(tmp_path / "run", epochs=80 // layout.steps)
    killed = time.monotonic()
    started.pop(lost).kill()
    for _, err, code in map(finish, started):
        assert code not in (0, None), err
    assert time.monotonic() - killed < 60

    saved = max(
        int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("*") if p.name.isdigit()
    )
    done = saved // layout.steps
    (out, err, code), *others = layout.run(*flags, "--epochs", done + 1)
    assert {code, *(code for *_, code in others)} == {0}, err
    assert f"resumed   after step {saved:,}, with {done} epochs done" in out
    assert len(read_records(tmp_path / "run")) == done + 1


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
@with_two
def test_a_signal_to_one_process_ends_all_in_good_order(tmp_path, layout):
    flags = (*layout.flags(tmp_path), "--workdir", tmp_path / "run", "--epochs", 100_000)
    started = layout.start(*flags)
    wait_for_epochs(tmp_path / "run")
    started[-1].send_signal(signal.SIGTERM)
    for _, err, code in map(finish, started):
        assert code == 143, err
        (line,) = (line for line in err.splitlines() if line.startswith("stopped: "))
        assert line.startswith("stopped: SIGTERM after step ")


MEET = """
import sys, train
from training import multihost
multihost.MEETING_SECONDS, multihost.PATIENCE_SECONDS = {seconds}, 0.5
sys.argv = ["train.py", "--num_processes", "2", *sys.argv[1:]]
sys.exit(train.main())
"""


@pytest.mark.parametrize(
    ("coordinator", "process_id", "missing"),
    [
        ("localhost:1", 1, r"process 0 at localhost:1 \(Connection refused\)"),
        pytest.param(
            *("no.such.host:1234", 1, r"process 0 at no\.such\.host:1234 \(.*\)"),
            marks=pytest.mark.slow,
        ),
        ("localhost:24680", 0, "the other processes"),
    ],
    ids=["nobody listens", "no such host", "nobody comes"],
)
def test_processes_that_do_not_meet_say_so_in_a_line(coordinator, process_id, missing):
    flags = ("--coordinator", coordinator, "--process_id", process_id)
    _, err, code = finish(start("-c", MEET.format(seconds=3), *flags, cwd=ROOT))
    assert code == 2
    expected = rf"waiting for {missing}\nerror: --distribute: waited 3 s in vain for {missing}\n"
    assert re.fullmatch(expected, err)


FAIL = """
import sys, train
from training import workdir

def choose(config):
    raise KeyError("a bug")

workdir.choose = choose
sys.exit(train.main())
"""


@pytest.mark.slow
def test_a_bug_in_the_first_process_keeps_its_traceback_and_ends_all():
    flags = ("--verbose", "--coordinator", free_address(), "--num_processes", 2, "--process_id")
    processes = [start("-c", FAIL, *flags, i, cwd=ROOT) for i in range(2)]
    (_, err, code), (_, other, other_code) = map(finish, processes)
    assert (code, other_code) == (1, 1)
    assert "in choose\n" in err
    assert "KeyError: 'a bug'" in err
    assert "RuntimeError: process 0 failed: 'a bug'" in other
    # --verbose says who waits for what.
    assert "waiting for what process 0 has to say" in other


def test_a_port_that_is_in_use_is_said():
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        flags = ("--coordinator", address, "--process_id", 0)
        _, err, code = finish(start("-c", MEET.format(seconds=30), *flags, cwd=ROOT))
    assert (code, err) == (2, f"error: --coordinator {address}: Address already in use\n")


@pytest.mark.slow
def test_a_process_without_a_device_ends_all(tmp_path):
    flags = ("--coordinator", free_address(), "--num_processes", 2, "--process_id")
    command = (ROOT / "train.py", "--workdir", tmp_path / "run", *flags)
    platforms = [os.environ | {"JAX_PLATFORMS": platform} for platform in ("cuda", "cpu")]
    started = [start(*command, i, env=env) for i, env in enumerate(platforms)]
    (_, err, code), (_, _, other_code) = map(finish, started)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: JAX_PLATFORMS=cuda: JAX finds no such device")
    assert other_code != 0


# What NCCL says to two processes that drive the same GPU.
ON_ONE_GPU = """
from jax.errors import JaxRuntimeError
from training import multihost, run
from training.config import TrainConfig

def refuse(collect):
    raise JaxRuntimeError("INTERNAL: NCCL: invalid usage\\n=== Source Location Trace: ===")

multihost.check_same = refuse
run.start(TrainConfig())
"""


def test_devices_that_cannot_reach_each_other_are_one_line():
    _, err, code = finish(start("-c", ON_ONE_GPU, cwd=ROOT))
    message = "devices of different processes cannot reach each other; each process needs its own"
    assert (code, err) == (
        2,
        f"error: --distribute: {message} (INTERNAL: NCCL: invalid usage)\n",
    )


def test_who_waits_for_the_others_answers_signals():
    flags = ("--coordinator", "localhost:1", "--process_id", 1)
    process = start("-c", MEET.format(seconds=300), *flags, cwd=ROOT)
    assert process.stderr.readline().startswith("waiting for process 0")
    process.send_signal(signal.SIGINT)
    _, err, code = finish(process)
    assert (code, err) == (130, "stopped: SIGINT\n")


def test_one_process_decides_for_itself():
    assert multihost.broadcast_from_primary(lambda: "here") == "here"

    def refuse():
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        multihost.broadcast_from_primary(refuse)
