import functools
import math
import threading
import time

import numpy as np
import pytest

from experiments import __main__ as program
from experiments import runner, tasks
from experiments.__main__ import Run, main
from experiments.figures import FIGURES, agd, paper, robustness, runs, spectral, yardstick
from experiments.figures.runs import Need
from experiments.figures.yardstick import Yardstick
from experiments.optimizers import OPTIMIZERS, VARIANTS
from experiments.store import Store

# Figures whose smoke runs are short.
SMALL = ("sizes", "deep", "extremes", "variants", "horizons", "robustness")
# Those whose smoke runs take minutes; the first has tests of its own.
LONG = ("yardstick", "resnet")


def fake(need, losses, **fields):
    """A finished run of these losses, a step apart."""
    columns = {"step": [step + 1 for step in range(len(losses))], "loss": losses}
    return {
        "key": runner.key_of(*need),
        "train": columns,
        "validation": columns | {"accuracy": [0.5] * len(losses)},
        "diverged": False,
        "seconds_per_step": 0.1,
        "device": "cpu",
    } | fields


def test_the_best_rate_is_taken_with_all_seeds():
    task = tasks.create("fcn", "smoke")
    needs = runs.tuned(task, "adamw", (0, 1, 2), {})
    assert [need.rate for need in needs] == list(OPTIMIZERS["adamw"].rates)
    losses = ([2.0], [1.0], [1.5])
    found = {n.name: fake(n, loss) for n, loss in zip(needs, losses, strict=True)}
    found[needs[0].name] |= {"diverged": True}
    more = runs.tuned(task, "adamw", (0, 1, 2), found)[len(needs) :]
    assert [(n.rate, n.seed) for n in more] == [(1e-3, 1), (1e-3, 2)]


@pytest.mark.parametrize(("losses", "rate"), [([3, 2, 1], 1e-2), ([1, 2, 3], 1e-4)])
def test_a_grid_grows_until_the_best_rate_is_inside(losses, rate):
    task = tasks.create("fcn", "smoke")
    needs = runs.tuned(task, "adamw", (0, 1), {})
    found = {n.name: fake(n, [loss]) for n, loss in zip(needs, losses, strict=True)}
    (added,) = (n for n in runs.tuned(task, "adamw", (0, 1), found) if n.name not in found)
    assert (added.rate, added.seed) == (rate, 0)
    found[added.name] = fake(added, [2])
    (added,) = (n for n in runs.tuned(task, "adamw", (0, 1), found) if n.name not in found)
    assert (added.rate, added.seed) == ({1e-2: 3e-3, 1e-4: 3e-4}[rate], 1)


def test_a_grid_does_not_grow_for_ever():
    task, found = tasks.create("fcn", "smoke"), {}
    for _ in range(20):
        for need in runs.tuned(task, "adamw", (0, 1), found):
            found[need.name] = fake(need, [-need.rate])
    assert len({run["key"]["rate"] for run in found.values()}) == runs.LONGEST_GRID


def test_the_yardstick_counts_steps_to_the_reference(monkeypatch):
    monkeypatch.setattr(runs, "LONGEST_GRID", 0)  # All rates are alike here.
    its, found = Yardstick(), {}
    for task in its.tasks("smoke"):
        for optimizer in its.optimizers:
            losses = {"adamw_cosine": [3, 2, 1.0], "agd": [3, 0.9, 0.5]}.get(optimizer, [3, 3, 3])
            for rate in OPTIMIZERS[optimizer].rates:
                for seed in yardstick.SEEDS:
                    need = Need(task, optimizer, rate, seed)
                    seconds = 0.2 if optimizer == "agd" else 0.1
                    found[need.name] = fake(need, losses, seconds_per_step=seconds)
    rows, means = (table.to_dict("records") for table in its.tables("smoke", found))
    by_name = {(row["task"], row["optimiser"]): row for row in rows}
    agd = by_name["fcn", "agd"]
    assert agd["validation loss"] == "0.5000 (0.5000 to 0.5000)"
    assert agd["steps to target"] == "2 (2 to 2)"
    assert agd["seconds to target"] == "0.4"
    assert by_name["gpt", "prodigy"]["steps to target"] == ""
    by_name = {row["optimiser"]: row for row in means}
    assert by_name["agd"]["loss, of the reference's"] == "0.500"
    steps = [2 / task.steps for task in its.tasks("smoke")]
    assert float(by_name["agd"]["steps, of the reference's"]) == pytest.approx(
        math.exp(np.mean(np.log(steps))), abs=1e-3
    )
    assert by_name["prodigy"]["target reached on"] == 0


def test_the_yardstick_leaves_out_what_the_reference_has_not_run():
    task = tasks.create("fcn", "smoke")
    need = Need(task, "agd")
    rows, means = Yardstick().tables("smoke", {need.name: fake(need, [3, 2, 1])})
    assert list(rows["validation loss"]) == ["1.0000"]
    assert set(means["tasks"]) == {0}


@pytest.fixture
def few(monkeypatch):
    """A yardstick of two tasks and two optimisers, each with one rate."""
    its = Yardstick()
    monkeypatch.setattr(its, "optimizers", ("agd", "adamw_cosine"), raising=False)
    names = ("fcn", "mlp")
    monkeypatch.setattr(its, "tasks", lambda budget: [tasks.create(n, budget) for n in names])
    monkeypatch.setitem(FIGURES, "yardstick", its)
    entry = OPTIMIZERS["adamw_cosine"]._replace(rates=(3e-3,))
    monkeypatch.setitem(OPTIMIZERS, "adamw_cosine", entry)
    return its


@pytest.mark.slow
def test_a_command_that_is_stopped_goes_on(tmp_path, monkeypatch, few, capsys):
    taken = []

    def run(*arguments):
        taken.append(arguments)
        if len(taken) == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    original = runner.run
    monkeypatch.setattr(runner, "run", run)
    command = Run("yardstick", "smoke", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert len(Store(tmp_path / "runs.jsonl").read()) == 4
    main(command)
    # Two tasks, two optimisers, three seeds; the one that was stopped is taken again.
    assert len(taken) == 2 * 2 * 3 + 1
    assert "| mlp    | adamw_cosine |" in (tmp_path / "yardstick-smoke.md").read_text()
    assert (tmp_path / "yardstick-smoke.png").stat().st_size > 10_000
    main(command)
    assert len(taken) == 2 * 2 * 3 + 1


def test_two_commands_share_the_work(tmp_path, monkeypatch, few):
    taken = []

    def run(task, programs, optimizer, pairs):
        [(rate, seed)] = pairs
        taken.append((task.name, optimizer, seed))
        time.sleep(0.02)
        return [fake(Need(task, optimizer, rate, seed), [1.0])]

    monkeypatch.setattr(runner, "run", run)
    # Rich draws one at a time in a process.
    monkeypatch.setattr(program, "Progress", functools.partial(program.Progress, disable=True))
    monkeypatch.setattr(program.time, "sleep", lambda seconds: threading.Event().wait(0.02))
    commands = [
        threading.Thread(target=program.take, args=(Run("yardstick", "smoke", tmp_path),))
        for _ in range(2)
    ]
    for command in commands:
        command.start()
    for command in commands:
        command.join()
    assert sorted(taken) == sorted(set(taken))
    assert len(taken) == 2 * 2 * 3


@pytest.mark.slow
@pytest.mark.parametrize("figure", SMALL)
def test_a_figure_is_drawn_from_its_runs(figure, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paper.Sizes, "depths", (2, 3))
    few = ("agd_spectral_averaged", "agd")
    for its in (spectral.Horizons, robustness.Robustness):
        monkeypatch.setattr(its, "optimizers", few)
    main(Run(figure, "smoke", tmp_path))
    assert f"Published: {FIGURES[figure].published}" in capsys.readouterr().out
    assert (tmp_path / f"{figure}-smoke.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("figure", sorted(FIGURES.keys() - {*SMALL, *LONG}))
def test_a_figure_with_larger_runs_is_drawn_too(figure, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paper.Rates, "rates", paper.Rates.rates[4:6])
    monkeypatch.setattr(agd, "five_tasks", lambda budget: runs.five_tasks(budget)[:1])
    main(Run(figure, "smoke", tmp_path))
    assert f"Published: {FIGURES[figure].published}" in capsys.readouterr().out


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_is_shown_before_there_are_runs(figure, tmp_path, capsys):
    main(program.Show(figure, "cpu", tmp_path))
    assert "Published" in capsys.readouterr().out


def test_every_optimiser_has_a_colour_of_its_own():
    # Variants are drawn in the colours of tasks.
    assert runs.COLOURS.keys() == OPTIMIZERS.keys() - VARIANTS.keys()
    assert len(set(runs.COLOURS.values())) == len(runs.COLOURS)
