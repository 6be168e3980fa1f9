import json
import math

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import figures, runner, tasks
from experiments.__main__ import Run, main
from experiments.figures import FIGURES, Need, Yardstick
from experiments.optimizers import OPTIMIZERS, cosine
from experiments.store import Store, name
from models.gpt import GPT
from models.vit import ViT


def fake(need, losses, **fields):
    """A finished run of these validation losses, a step apart."""
    points = [[step + 1, loss, 0.5, 0.1 * (step + 1)] for step, loss in enumerate(losses)]
    return {"key": runner.key_of(*need), "validation": points, "diverged": False} | fields


def test_a_run_is_measured_along_the_way():
    task = tasks.create("fcn", "smoke", steps=12, depth=3, width=16)
    programs = runner.compile_programs(task, "agd")
    run = runner.run(task, programs, "agd", 1.0, 0)
    assert [step for step, _ in run["train"]] == list(range(1, 13))
    assert [step for step, *_ in run["validation"]] == [2, 4, 6, 8, 10, 12]
    first, last = run["validation"][0], run["validation"][-1]
    assert last[1] < 0.9 * first[1]
    assert last[2] > first[2]
    assert not run["diverged"]
    assert json.loads(json.dumps(run)) == run
    again = runner.run(task, programs, "agd", 1.0, 0)
    assert again["train"] == run["train"]
    assert runner.run(task, programs, "agd", 1.0, 1)["train"] != run["train"]


def test_the_rate_is_an_argument_of_the_programs():
    task = tasks.create("fcn", "smoke", steps=4, depth=3, width=16)
    programs = runner.compile_programs(task, "sgd")
    slow, fast = (runner.run(task, programs, "sgd", rate, 0) for rate in (1e-4, 1e-2))
    assert slow["train"][0] == fast["train"][0]
    assert slow["train"][-1] != fast["train"][-1]
    assert programs.steps._cache_size() == 1


def test_a_run_that_diverges_is_a_result():
    task = tasks.create("fcn", "smoke", steps=40)
    run = runner.run(task, runner.compile_programs(task, "sgd"), "sgd", 0.1, 0)
    assert run["diverged"]
    assert len(run["train"]) < 40
    assert figures.final(run) == math.inf


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_learns(optimizer):
    task = tasks.create("fcn", "smoke", steps=60, depth=3, width=32)
    programs = runner.compile_programs(task, optimizer)
    rates = OPTIMIZERS[optimizer].rates
    losses = [
        figures.final(runner.run(task, programs, optimizer, rate, 0))
        for rate in rates[1:3] or rates
    ]
    assert min(losses) < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_task_is_learnt(task):
    task = tasks.create(task, "smoke")
    run = runner.run(task, runner.compile_programs(task, "adamw"), "adamw", 3e-3, 0)
    assert run["train"][-1][1] < 0.8 * run["train"][0][1]


def test_the_cosine_warms_up_and_falls_to_zero():
    schedule = cosine(2.0, 100)
    rates = [float(schedule(step)) for step in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 0.01


def test_the_store_keeps_what_was_finished(tmp_path):
    store, other = Store(tmp_path / "a" / "runs.jsonl"), Store(tmp_path / "a" / "runs.jsonl")
    assert store.read() == {}
    store.add({"key": {"a": 1, "b": 2}, "x": 1})
    with open(store.path, "a") as file:
        file.write('{"key": {"a"')  # As a kill leaves it.
    other.add({"key": {"b": 3, "a": 1}, "x": 2})
    assert {run["x"] for run in store.read().values()} == {1, 2}
    assert name({"a": 1, "b": 2}) == name({"b": 2, "a": 1})


def test_the_best_rate_is_taken_with_all_seeds(monkeypatch):
    task = tasks.create("fcn", "smoke")
    needs = figures.tuned(task, "adamw", (0, 1, 2), {})
    assert [need.rate for need in needs] == list(OPTIMIZERS["adamw"].rates)
    losses = (2.0, 1.0, 3.0, 1.5)
    runs = {n.name: fake(n, [loss]) for n, loss in zip(needs, losses, strict=True)}
    runs[needs[0].name] |= {"diverged": True}
    more = figures.tuned(task, "adamw", (0, 1, 2), runs)[len(needs) :]
    assert [(n.rate, n.seed) for n in more] == [(needs[1].rate, 1), (needs[1].rate, 2)]


def test_the_yardstick_counts_steps_to_the_reference():
    yardstick, runs = Yardstick(), {}
    for task in yardstick.tasks("smoke"):
        for optimizer, entry in OPTIMIZERS.items():
            losses = {"adamw_cosine": [3, 2, 1.0], "agd": [3, 0.9, 0.5]}.get(optimizer, [3, 3, 3])
            for rate in entry.rates:
                for seed in yardstick.seeds:
                    need = Need(task, optimizer, rate, seed)
                    runs[need.name] = fake(need, losses)
    table = yardstick.table("smoke", runs)
    assert "| fcn | agd |  | 0.5000 (0.5000 to 0.5000) | 50.0% | 2 | 0.2 |" in table
    assert "| gpt | prodigy |  | 3.0000 (3.0000 to 3.0000) | 50.0% | not reached |  |" in table
    assert "| agd | 0.500 | 5 |" in table
    assert "| prodigy | 3.000 | 5 |" in table


@pytest.mark.slow
def test_a_command_that_is_stopped_goes_on(tmp_path, monkeypatch, capsys):
    few = {name: OPTIMIZERS[name]._replace(rates=(3e-3,)) for name in ("agd", "adamw_cosine")}
    for module in (figures, runner):
        monkeypatch.setattr(module, "OPTIMIZERS", few)
    monkeypatch.setattr(tasks, "TASKS", {"fcn": "images", "mlp": "images"})
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
    assert "| mlp | adamw_cosine |" in (tmp_path / "yardstick-smoke.md").read_text()
    assert (tmp_path / "yardstick-smoke.png").stat().st_size > 10_000
    main(command)
    assert len(taken) == 2 * 2 * 3 + 1


def test_every_figure_has_colours_of_its_own_for_all_optimisers():
    assert len(set(figures.COLOURS.values())) == len(OPTIMIZERS)
    assert all(figure.published for figure in FIGURES.values())


def test_gpt_does_not_look_ahead():
    model = GPT(7, 8, depth=2, width=16, heads=2, rngs=nnx.Rngs(0))
    tokens = np.arange(8)[None] % 7
    other = tokens.copy()
    other[0, 5] = 0
    one, two = model(tokens), model(other)
    assert one.shape == (1, 8, 7)
    np.testing.assert_allclose(one[:, :5], two[:, :5], atol=1e-6)
    assert np.abs(one[:, 5:] - two[:, 5:]).max() > 1e-3


def test_vit_sees_patches_and_where_they_are():
    model = ViT((8, 12, 3), 5, depth=1, width=16, heads=2, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    assert model(images).shape == (2, 5)
    assert model.positions.embedding.shape == (6, 16)
    swapped = images.at[:, :, :4].set(images[:, :, 4:8]).at[:, :, 4:8].set(images[:, :, :4])
    assert np.abs(model(images) - model(swapped)).max() > 1e-5
    model.positions.embedding[...] = np.zeros((6, 16))
    # Without positions, attention and the mean do not know in which order patches come.
    np.testing.assert_allclose(model(images), model(swapped), atol=1e-5)
    assert optax.tree.size(nnx.state(model, nnx.Param)) > 0
