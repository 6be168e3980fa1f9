"""What a dispatch of steps costs with two processes, and with one that has both devices.

    python benchmarks/processes.py

trains fcn on digits over two virtual devices of a CPU, one step to a dispatch, which is the worst
case: a run dispatches as many steps as take a quarter of a second. It times dispatches after which
nothing is agreed on, dispatches after which the processes agree as training does (on the votes of
one dispatch ago), and dispatches after which they wait for one another.
"""

import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import tyro

sys.path.insert(0, os.fspath(Path(__file__).parent.parent))


@dataclasses.dataclass(frozen=True)
class Options:
    """Times dispatches."""

    dispatches: int = 200
    """How many are timed together."""
    turns: int = 15
    """How often each kind is timed, in turns."""


def main(options: Options) -> None:
    """Prints the table of ``benchmarks/RESULTS.md``."""
    (alone,) = measure(options, 1)
    together, _ = measure(options, 2)
    print(f"one process, two devices               {alone['nothing']:6.2f} ms a dispatch")
    for name, milliseconds in together.items():
        row = f"two processes, agreeing on {name:12s}  {milliseconds:6.2f} ms a dispatch"
        share = (milliseconds - together["nothing"]) / 250
        print(f"{row}, {share:6.2%} of a quarter of a second more than on nothing")


def measure(options: Options, processes: int) -> list[dict[str, float]]:
    """The milliseconds of a dispatch, by what is agreed on, as each process measures them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{s.getsockname()[1]}"
    devices = f"--xla_force_host_platform_device_count={2 // processes}"
    env = os.environ | {"XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"}
    started = []
    for i in range(processes):
        one = json.dumps([coordinator, processes, i, *dataclasses.astuple(options)])
        command = [sys.executable, __file__, "--process", one]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(1)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def one_process(
    coordinator: str, processes: int, process_id: int, dispatches: int, turns: int
) -> dict[str, float]:
    """Trains, and returns the milliseconds of a dispatch by what is agreed on."""
    import jax

    from training import multihost, run
    from training.config import TrainConfig
    from training.data import load_data
    from training.feeds import make_feed
    from training.plan import make_plan

    meet = {"coordinator": coordinator, "num_processes": processes, "process_id": process_id}
    config = TrainConfig(mesh="data=2", **meet if processes > 1 else {}).resolved()
    run.start(config)
    seconds: dict[str, list[float]] = {}
    with run.devices(config) as mesh:
        plan = make_plan(config, mesh)
        feed = make_feed(plan, load_data(config))
        state, sums, step = feed.compile(plan.create_train_state()), feed.zero_metrics(), 0
        for _ in range(turns):
            agreements = {"nothing": lambda *vote: None}
            if processes > 1:
                late = multihost.LateAgreement()
                agreements |= {"late votes": late.agree, "votes": multihost.agree}
            for name, agree in agreements.items():
                start = time.perf_counter()
                for _ in range(dispatches):
                    step, before = step + 1, sums
                    state, sums = feed.train(state, sums, step)
                    jax.device_get(before)
                    agree(0, False, 1)
                jax.block_until_ready(state)
                seconds.setdefault(name, []).append((time.perf_counter() - start) / dispatches)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        print(json.dumps(one_process(*json.loads(sys.argv[2]))))
    else:
        main(tyro.cli(Options, use_underscores=True))
