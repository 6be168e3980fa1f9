"""``python -m experiments run FIGURE --budget cpu``, ``show FIGURE``, ``list``."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import Positional

from experiments.tasks import Budget
from input_pipeline.command_line import complain, parse, say
from input_pipeline.errors import DataError

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Show:
    """Prints the table of a figure and draws it, from the runs that are there."""

    figure: Positional[str]
    """The figure, as ``list`` names it."""
    budget: Budget = "cpu"
    """How large its runs are."""
    results: Path = RESULTS
    """The folder of finished runs, tables and pictures."""


@dataclass(frozen=True)
class Run(Show):
    """Takes the runs of a figure that are not there yet, then shows it."""


@dataclass(frozen=True)
class List:
    """Lists the figures."""


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[List, tyro.conf.subcommand("list")]
)


def main(command: Show | List) -> None:
    """Does what a command says.

    Raises:
      DataError: if the data of a task are not there, or the figure is unknown.
    """
    from experiments.figures import FIGURES

    if isinstance(command, List):
        for name, figure in FIGURES.items():
            say(f"{name}: {(type(figure).__doc__ or '').splitlines()[0]}")
        return
    if command.figure not in FIGURES:
        raise DataError(f"{command.figure}: unknown; choose from {', '.join(FIGURES)}")
    if isinstance(command, Run):
        take(command)
    show(command)


def take(command: Run) -> None:
    """Takes the runs of a figure that are not there yet, those of a task and optimiser together.

    Another command for the same results takes other tasks or optimisers meanwhile.
    """
    from filelock import Timeout

    from experiments import runner
    from experiments.figures import FIGURES
    from experiments.figures.runs import Need
    from experiments.store import Store

    store = Store(command.results / "runs.jsonl")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )

    def missing() -> list[Need]:
        runs = store.read()  # Another command may have added some.
        needs = FIGURES[command.figure].needs(command.budget, runs)
        found = [need for need in needs if need.name not in runs]
        progress.update(bar, total=len(needs), completed=len(needs) - len(found))
        return found

    def take_group(group: str) -> None:
        programs = None  # Compiled once for all rates and seeds.
        while needs := [need for need in missing() if need.group == group]:
            task, optimizer, rate, seed = needs[0]
            progress.update(bar, description=f"{task.name} {optimizer} {rate:g} seed {seed}")
            programs = programs or runner.compile_programs(task, optimizer)
            these = needs if runner.together(task) else needs[:1]
            runs = [(need.rate, need.seed) for need in dict.fromkeys(these)]
            for record in runner.run(task, programs, optimizer, runs):
                store.add(record)

    with Progress(*columns) as progress:
        bar = progress.add_task("")
        while groups := dict.fromkeys(need.group for need in missing()):
            for group in groups:
                with contextlib.suppress(Timeout), store.lock(group).acquire(timeout=0):
                    take_group(group)
                    break
            else:
                progress.update(bar, description="waiting for another command")
                time.sleep(5)


def show(command: Show) -> None:
    """Prints the tables of a figure, and writes them and its picture."""
    from experiments.figures import FIGURES
    from experiments.store import Store

    figure = FIGURES[command.figure]
    runs = Store(command.results / "runs.jsonl").read()
    tables = [
        table.to_markdown(index=False, disable_numparse=True)
        for table in figure.tables(command.budget, runs)
    ]
    text = "\n\n".join([*tables, f"Published: {figure.published}"])
    say(text)
    file = command.results / f"{command.figure}-{command.budget}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".md").write_text(f"{text}\n")
    figure.draw(command.budget, runs).savefig(file.with_suffix(".png"), dpi=110)
    say(f"{file}.md, {file}.png")


if __name__ == "__main__":
    try:
        # A union of classes is no type[T] to mypy (PEP 747).
        main(parse(Command, "python -m experiments"))  # type: ignore[arg-type]
    except DataError as error:
        complain(f"error: {error}")
        sys.exit(2)
