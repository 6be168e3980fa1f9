import functools
import json
import math
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import agd_jax
from experiments import __main__ as program
from experiments import runner, tasks, variants
from experiments.__main__ import Run, main
from experiments.figures import FIGURES, paper, robustness, runs, spectral, yardstick
from experiments.figures.runs import Need
from experiments.figures.yardstick import Yardstick
from experiments.optimizers import OPTIMIZERS, VARIANTS, cosine, muon
from experiments.store import Store, name
from models.gpt import GPT
from models.vit import ViT
from tests.images import LABELS, write_tree


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


def test_a_run_is_measured_along_the_way():
    task = tasks.create("fcn", "smoke", steps=12, depth=3, width=16)
    programs = runner.compile_programs(task, "agd")
    run = runner.run(task, programs, "agd", [(1.0, 0)])[0]
    train, validation = run["train"], run["validation"]
    assert train["step"] == list(range(1, 13))
    assert validation["step"] == [2, 4, 6, 8, 10, 12]
    assert validation["loss"][-1] < 0.9 * validation["loss"][0]
    assert validation["accuracy"][-1] > validation["accuracy"][0]
    # One step between two points, so one eta, to which the size of a step is in proportion.
    assert train["eta_min"] == train["eta_max"]
    ratios = np.array(train["size"]) / np.array(train["eta_min"])
    np.testing.assert_allclose(ratios, ratios[0], rtol=0.1)
    assert not run["diverged"]
    assert json.loads(json.dumps(run)) == run
    again = runner.run(task, programs, "agd", [(1.0, 0)])[0]
    assert again["train"] == train
    assert runner.run(task, programs, "agd", [(1.0, 1)])[0]["train"] != train


def test_the_range_of_eta_is_over_all_steps_between_two_points(monkeypatch):
    task = tasks.create("fcn", "smoke", steps=12, depth=3, width=16)
    programs = runner.compile_programs(task, "agd")
    fine = runner.run(task, programs, "agd", [(1.0, 0)])[0]["train"]
    monkeypatch.setattr(runner, "POINTS", 3)
    coarse = runner.run(task, programs, "agd", [(1.0, 0)])[0]["train"]
    assert coarse["step"] == [4, 8, 12]
    for column, of in (("eta_min", min), ("eta_max", max), ("loss", np.mean)):
        expected = [of(fine[column][i : i + 4]) for i in (0, 4, 8)]
        np.testing.assert_allclose(coarse[column], expected, rtol=1e-5)


@pytest.mark.slow
def test_convolutions_step_by_step_are_seen_as_in_a_loop(monkeypatch):
    task = tasks.create("cnn", "smoke", steps=4, width=4, batch_size=8)
    one_by_one = runner.run(task, runner.compile_programs(task, "agd"), "agd", [(1.0, 0)])[0]
    monkeypatch.setattr(runner.jax, "default_backend", lambda: "tpu")
    loop = runner.run(task, runner.compile_programs(task, "agd"), "agd", [(1.0, 0)])[0]
    for column, values in one_by_one["train"].items():
        np.testing.assert_allclose(values, loop["train"][column], rtol=1e-3)


@pytest.mark.slow
def test_runs_in_one_program_are_those_alone(monkeypatch):
    task = tasks.create("fcn", "smoke", steps=12, depth=3, width=16)
    pairs = [(1e-2, 0), (1e-1, 0), (1e8, 0), (1e-2, 1)]
    programs = runner.compile_programs(task, "sgd")
    alone = [runner.run(task, programs, "sgd", [pair])[0] for pair in pairs]
    monkeypatch.setattr(runner, "together", lambda task: True)
    found = runner.run(task, runner.compile_programs(task, "sgd"), "sgd", pairs)
    for one, other in zip(alone, found, strict=True):
        assert one["key"] == other["key"]
        # Of several, nobody knows the time of one.
        assert "seconds_per_step" not in other
        assert one["diverged"] == other["diverged"] == (one["key"]["rate"] == 1e8)
        for part in ("train", "validation"):
            for column, values in one[part].items():
                np.testing.assert_allclose(other[part][column], values, rtol=1e-3)


def test_the_rate_is_an_argument_of_the_programs():
    task = tasks.create("fcn", "smoke", steps=4, depth=3, width=16)
    programs = runner.compile_programs(task, "sgd")
    slow, fast = (
        runner.run(task, programs, "sgd", [(rate, 0)])[0]["train"] for rate in (1e-4, 1e-2)
    )
    assert slow["loss"][0] == fast["loss"][0]
    assert slow["loss"][-1] != fast["loss"][-1]
    assert programs.steps._cache_size() == 1


def test_a_run_that_diverges_is_a_result():
    task = tasks.create("fcn", "smoke", steps=40)
    run = runner.run(task, runner.compile_programs(task, "sgd"), "sgd", [(0.1, 0)])[0]
    assert run["diverged"]
    assert len(run["train"]["step"]) < 40
    assert runs.final(run) == math.inf
    step = run["train"]["step"][-1]
    assert runs.row([run], rate=0.1) == {"rate": 0.1, "train loss": f"diverged by step {step}"}


def test_the_optimiser_alone_sees_the_factor_of_a_loss():
    def losses(optimizer, **changes):
        task = tasks.create("fcn", "smoke", steps=3, depth=3, width=16, **changes)
        programs = runner.compile_programs(task, optimizer)
        return np.array(runner.run(task, programs, optimizer, [(1e-2, 0)])[0]["train"]["loss"])

    plain, scaled = losses("sgd"), losses("sgd", loss_scale=3.0)
    assert plain[0] == scaled[0]
    assert np.all(plain[1:] > scaled[1:])
    # Adam divides by the size of gradients.
    np.testing.assert_allclose(losses("adam"), losses("adam", loss_scale=3.0), rtol=1e-4)


def test_a_part_of_labels_is_drawn_anew():
    clean, noisy = (tasks.create("mlp", "smoke", label_noise=p).data().arrays for p in (0.0, 0.5))
    same = np.mean(np.array(clean["train"].labels) == np.array(noisy["train"].labels))
    assert same == pytest.approx(0.5 + 0.5 / 10, abs=0.05)
    np.testing.assert_array_equal(clean["test"].labels, noisy["test"].labels)


def test_all_that_determines_a_run_is_in_its_key():
    keys = [
        runner.key_of(tasks.create("fcn", "smoke", **changes), optimizer, rate, seed)
        for changes, optimizer, rate, seed in (
            ({}, "adamw", 0.1, 0),
            ({"depth": 3}, "adamw", 0.1, 0),
            ({"batch_size": 3}, "adamw", 0.1, 0),
            ({"steps": 3}, "adamw", 0.1, 0),
            ({"loss_scale": 3.0}, "adamw", 0.1, 0),
            ({"label_noise": 0.3}, "adamw", 0.1, 0),
            ({"dtype": "bfloat16"}, "adamw", 0.1, 0),
            ({}, "adam", 0.1, 0),
            ({}, "adamw", 0.2, 0),
            ({}, "adamw", 0.1, 1),
        )
    ]
    assert len(set(map(name, keys))) == len(keys)
    assert keys[0]["optimizer_settings"] == {"weight_decay": 1e-4}


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adam():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 8))
    params = {"conv": {"kernel": kernel}, "head": {"kernel": jnp.ones((8, 2))}}
    tx = muon(1.0, adam_share=0.5)
    updates, _ = tx.update(params, tx.init(params), params)
    singular = jnp.linalg.svd(updates["conv"]["kernel"].reshape(36, 8), compute_uv=False)
    assert singular.max() / singular.min() < 2
    adam = optax.adamw(0.5, b2=0.999, weight_decay=0, nesterov=True)
    expected, _ = adam.update(params["head"], adam.init(params["head"]), params["head"])
    np.testing.assert_allclose(updates["head"]["kernel"], expected["kernel"], rtol=1e-5)


@pytest.mark.slow
def test_averaged_weights_have_statistics_of_their_own():
    task = tasks.create("cnn", "smoke", steps=30, width=8)
    programs = runner.compile_programs(task, "schedule_free_adamw")
    # Without these, BatchNorm has those of weights elsewhere, and the loss is far higher.
    run = runner.run(task, programs, "schedule_free_adamw", [(1.0, 0)])[0]
    assert run["validation"]["loss"][-1] < run["train"]["loss"][-1] + 0.3


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        *(name for name in OPTIMIZERS if name not in VARIANTS),
        # Those with code of their own.
        *("v_rows", "v_nuclear", "v_distance", "v_decay", "v_relative"),
    ],
)
def test_every_optimiser_learns(optimizer):
    task = tasks.create("fcn", "smoke", steps=60, depth=3, width=32)
    programs = runner.compile_programs(task, optimizer)
    rates = OPTIMIZERS[optimizer].rates
    losses = [
        runs.final(runner.run(task, programs, optimizer, [(rate, 0)])[0])
        for rate in rates[1:3] or rates
    ]
    assert min(losses) < 0.9


@pytest.mark.slow
def test_a_variant_without_a_change_is_spectral_agd():
    apply = lambda p, x: jnp.tanh(p["table"][x] @ p["in"] + p["bias"]) @ p["out"]
    shapes = {"table": (5, 4), "in": (4, 6), "bias": (6,), "out": (6, 3)}
    keys = iter(jax.random.split(jax.random.key(0), 20))
    draw = lambda: {k: jax.random.normal(next(keys), shape) for k, shape in shapes.items()}
    params, x = draw(), jnp.arange(5)
    geometry = agd_jax.geometry_of(apply, params, x)
    library = agd_jax.averaged(agd_jax.agd(geometry=geometry, norm="spectral"))
    txs = (library, variants.spectral(2, geometry))
    states = [tx.init(params) for tx in txs]
    for grads in (draw(), draw(), jax.tree.map(lambda g: 5 * g, draw())):
        (expected, one), (found, other) = (
            tx.update(grads, state, params) for tx, state in zip(txs, states, strict=True)
        )
        states = [one, other]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
        )


@pytest.mark.slow
@pytest.mark.parametrize("task", ["fcn", "mlp", "cnn", "vit", "gpt"])
def test_every_task_is_learnt(task):
    task = tasks.create(task, "smoke")
    run = runner.run(task, runner.compile_programs(task, "adamw"), "adamw", [(3e-3, 0)])[0]
    assert run["train"]["loss"][-1] < 0.9 * run["train"]["loss"][0]


def test_resnet50_has_all_of_imagenet_at_64_pixels(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGENET_PATH", str(write_tree(tmp_path, train=6, test=4)))
    task = tasks.create("resnet50", "gpu")
    assert task.settings["image_size"] == 64
    data = task.data()
    assert data.arrays["test"].images.shape == (4, 64, 64, 3)
    assert data.arrays["train"].labels.tolist() == sorted(LABELS + LABELS)
    batch = data.train(data.arrays, jnp.array([2, 0]), jax.random.key(0))
    logits = jax.eval_shape(lambda: task.network(nnx.Rngs(0))(batch[0]))
    assert logits.shape == (2, 1000)
    assert batch[1].tolist() == [1, 0]


def test_the_cosine_warms_up_and_falls_to_zero():
    schedule = cosine(2.0, 100, 0.05)
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


def test_the_best_rate_is_taken_with_all_seeds():
    task = tasks.create("fcn", "smoke")
    needs = runs.tuned(task, "adamw", (0, 1, 2), {})
    assert [need.rate for need in needs] == list(OPTIMIZERS["adamw"].rates)
    losses = ([2.0], [1.0], [3.0], [1.5])
    found = {n.name: fake(n, loss) for n, loss in zip(needs, losses, strict=True)}
    found[needs[0].name] |= {"diverged": True}
    more = runs.tuned(task, "adamw", (0, 1, 2), found)[len(needs) :]
    assert [(n.rate, n.seed) for n in more] == [(1e-3, 1), (1e-3, 2)]


@pytest.mark.parametrize(("losses", "rate"), [([4, 3, 2, 1], 0.03), ([1, 2, 3, 4], 1e-4)])
def test_a_grid_grows_until_the_best_rate_is_inside(losses, rate):
    task = tasks.create("fcn", "smoke")
    needs = runs.tuned(task, "adamw", (0, 1), {})
    found = {n.name: fake(n, [loss]) for n, loss in zip(needs, losses, strict=True)}
    (added,) = (n for n in runs.tuned(task, "adamw", (0, 1), found) if n.name not in found)
    assert (added.rate, added.seed) == (rate, 0)
    found[added.name] = fake(added, [2])
    (added,) = (n for n in runs.tuned(task, "adamw", (0, 1), found) if n.name not in found)
    assert (added.rate, added.seed) == ({0.03: 1e-2, 1e-4: 3e-4}[rate], 1)


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
@pytest.mark.parametrize(
    "figure", ["sizes", "deep", "extremes", "variants", "horizons", "robustness"]
)
def test_a_figure_is_drawn_from_its_runs(figure, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paper.Sizes, "depths", (2, 3))
    few = ("agd_spectral_averaged", "agd")
    for its in (spectral.Horizons, robustness.Robustness):
        monkeypatch.setattr(its, "optimizers", few)
    main(Run(figure, "smoke", tmp_path))
    assert f"Published: {FIGURES[figure].published}" in capsys.readouterr().out
    assert (tmp_path / f"{figure}-smoke.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["tuned", "batches", "rates", "breadth", "gpt"])
def test_a_figure_with_larger_runs_is_drawn_too(figure, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paper.Rates, "rates", paper.Rates.rates[4:6])
    main(Run(figure, "smoke", tmp_path))
    assert f"Published: {FIGURES[figure].published}" in capsys.readouterr().out


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_is_shown_before_there_are_runs(figure, tmp_path, capsys):
    main(program.Show(figure, "cpu", tmp_path))
    assert "Published" in capsys.readouterr().out


def test_every_optimiser_has_a_colour_of_its_own():
    # Variants are in tables alone.
    assert runs.COLOURS.keys() == OPTIMIZERS.keys() - VARIANTS.keys()
    assert len(set(runs.COLOURS.values())) == len(runs.COLOURS)


@pytest.mark.slow
def test_gpt_does_not_look_ahead():
    model = GPT(7, 8, depth=2, width=16, heads=2, rngs=nnx.Rngs(0))
    tokens = np.arange(8)[None] % 7
    other = tokens.copy()
    other[0, 5] = 0
    one, two = model(tokens), model(other)
    assert one.shape == (1, 8, 7)
    np.testing.assert_allclose(one[:, :5], two[:, :5], atol=1e-6)
    assert np.abs(one[:, 5:] - two[:, 5:]).max() > 1e-3


@pytest.mark.slow
def test_the_weights_of_gpt2_are_small():
    size = {"depth": 4, "width": 128}
    model = tasks.create("gpt", "smoke", start="gpt2", **size).network(nnx.Rngs(0))
    deviation = lambda layer: float(jnp.std(layer.kernel[...]))
    assert deviation(model.blocks[0].query) == pytest.approx(0.02, rel=0.05)
    assert deviation(model.blocks[0].down) == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    assert deviation(model.head) == pytest.approx(0.02, rel=0.05)
    model = tasks.create("gpt", "smoke", **size).network(nnx.Rngs(0))
    assert deviation(model.blocks[0].query) == pytest.approx(128**-0.5, rel=0.05)


@pytest.mark.slow
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
