import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import agd_jax
from experiments import runner, tasks, variants
from experiments.figures import runs
from experiments.optimizers import OPTIMIZERS, VARIANTS, cosine, muon
from experiments.store import Store, name
from tests.images import LABELS, write_tree


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
@pytest.mark.parametrize("task", sorted(tasks.TASKS.keys() - {"resnet18", "vgg16", "resnet50"}))
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
