"""How long it takes to begin: `--help`, imports, the first step, a whole run on digits.

    python benchmarks/startup.py

starts each in a process of its own, several times in turns, and prints the median. A cold run has
an empty folder for what is compiled, a warm one the folder that the cold one left. With
`--data_dir`, where CIFAR-10 is prepared, the first and the second loading of it too.
"""

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Options:
    """Times starts."""

    data_dir: str | None = None
    """Where TFDS has CIFAR-10; left out, loading is not timed."""
    turns: int = 5
    """How often each is timed."""
    flags: str = ""
    """More flags for the runs."""


def main(options: Options) -> None:
    """Prints the table of ``benchmarks/RESULTS.md``."""
    seconds: dict[str, list[float]] = {}
    for _ in range(options.turns):
        for name, value in turn(options).items():
            seconds.setdefault(name, []).append(value)
    for name, values in seconds.items():
        low, high = min(values), max(values)
        print(f"{name:36s}  {statistics.median(values):6.2f} s  ({low:.2f} to {high:.2f})")


def turn(options: Options) -> dict[str, float]:
    """The seconds of everything, once."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"XDG_CACHE_HOME": folder}
        seconds = {
            "python that does nothing": run(["-c", "pass"], env),
            "train.py --help": run(["train.py", "--help"], env),
            "import jax": run(["-c", "import jax"], env),
            "import agd_jax": run(["-c", "import agd_jax"], env),
        }
        for name in ("cold", "warm"):
            flags = [*options.flags.split(), "--workdir", f"{folder}/{name}"]
            first, whole = train(flags, env)
            seconds[f"until the first step, {name}"] = first
            seconds[f"train.py, {name}"] = whole
        if options.data_dir:
            for cache in Path(options.data_dir).glob("cifar10/decoded-*.npz"):
                cache.unlink()
            code = "from input_pipeline import resident, specs; "
            code += f"resident.load(specs.SPECS['cifar10'], {options.data_dir!r})"
            for name in ("decoding it", "from what was decoded"):
                seconds[f"loading cifar10, {name}"] = run(["-c", code], env)
    return seconds


def run(arguments: list[str], env: dict[str, str]) -> float:
    """The seconds of a Python process."""
    start = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, check=True, **quiet)
    return time.perf_counter() - start


def train(flags: list[str], env: dict[str, str]) -> tuple[float, float]:
    """The seconds of a training until everything is compiled, and until its end."""
    start = time.perf_counter()
    command = [sys.executable, "-u", "train.py", *flags]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("compiled in"):
                first = time.perf_counter() - start
    if process.returncode:
        sys.exit(process.returncode)
    return first, time.perf_counter() - start


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
