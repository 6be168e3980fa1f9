import functools
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
import types

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from input_pipeline import streaming
from input_pipeline.batch import Batch
from input_pipeline.errors import DataError
from tests.helpers import (
    ROOT,
    finish,
    read_records,
    same,
    small_resnet18,
    start,
    untimed,
    wait_for_epochs,
)
from tests.images import write_tree
from training import loop, sharding, step
from training.checkpoints import reading
from training.config import TrainConfig
from training.errors import ConfigError, NonFiniteError, ReadError
from training.feeds.streamed import SHARED_MEMORY
from training.plan import make_plan
from training.run import evaluate, train
from training.signals import Stopped
from training.step import LOSSES
from training.workdir import saved_steps

FIELDS = {
    "dataset": "imagenet",
    "arch": "fcn",
    "depth": 2,
    "width": 16,
    "image_size": 16,
    "train_bs": 5,
    "test_bs": 4,
    "epochs": 2,
    "workers": 0,
    "platform": "cpu",
}


@pytest.fixture
def tree(tmp_path):
    return str(write_tree(tmp_path / "imagenet", train=23, test=10))


def run(tmp_path, name="run", **fields):
    return train(TrainConfig(workdir=tmp_path / name, **(FIELDS | fields)))


def test_imagenet_trains(tmp_path, tree):
    result = run(tmp_path, data_dir=tree, epochs=30, train_bs=23, depth=4, width=64)
    losses = [record.train_loss for record in result.records]
    assert losses[0] == pytest.approx(np.log(1000), rel=0.1)
    assert np.mean(losses[-5:]) < 0.2 * losses[0]
    assert [record.step for record in result.records] == list(range(1, 31))
    assert all(record.unreadable == 0 for record in result.records)
    assert read_records(tmp_path / "run") == [record.to_json() for record in result.records]


@pytest.mark.slow
def test_a_label_means_the_class_that_it_had_in_training(tmp_path):
    """Whatever classes the tree has that a run is tested on, or goes on with."""
    whole, some, renamed = (tmp_path / name for name in ("whole", "some", "renamed"))
    write_tree(whole, train=24, test=12, synsets=("blue", "green", "red"))
    for other in (some, renamed):
        shutil.copytree(whole, other)
    for split in ("train", "val"):
        (renamed / split / "blue").rename(renamed / split / "z_blue")
        # As many images, so that it can be gone on with.
        blue, green = some / split / "blue", some / split / "green"
        one = next(green.iterdir())
        for image in blue.iterdir():
            shutil.copy(one, green / f"again_{image.name}")
        shutil.rmtree(blue)
    fields = {"loss": "xent", "train_bs": 12, "test_bs": 12}
    run(tmp_path, data_dir=whole, epochs=30, **fields)

    def accuracy(data_dir):
        config = TrainConfig(workdir=tmp_path / "run", eval_only=True, data_dir=data_dir, workers=0)
        best, last = evaluate(config)
        assert last.epochs == 30
        return best.accuracy

    assert accuracy(whole) == 1
    assert accuracy(some) == 1
    message = r"has classes that this run was not trained on: z_blue; it knows blue, green, red$"
    with pytest.raises(DataError, match=message):
        accuracy(renamed)
    with pytest.raises(DataError, match=message):
        run(tmp_path, data_dir=renamed, epochs=31, **fields)
    run(tmp_path, data_dir=some, epochs=31, **fields)
    assert reading.saved_classes(tmp_path / "run") == ["blue", "green", "red"]


@pytest.mark.skipif(not os.path.isdir(SHARED_MEMORY), reason="has no /dev/shm")
def test_batches_that_shared_memory_has_no_room_for_are_refused(tmp_path, tree, monkeypatch):
    # Four batches of 5 and four of 4 for each of three workers, of 16 x 16 x 3 bytes an image.
    needed = 3 * 4 * (5 + 4) * 16 * 16 * 3
    usage = types.SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(
        ConfigError, match=r"^--workers 3: their batches take up to 0 MB of /dev/shm"
    ):
        run(tmp_path, data_dir=tree, workers=3)


@pytest.mark.slow
def test_workers_and_dispatches_change_nothing(tmp_path, tree, monkeypatch):
    threads = run(tmp_path, "threads", data_dir=tree)
    monkeypatch.setattr(loop, "DISPATCH_SECONDS", 0)
    processes = run(tmp_path, "processes", data_dir=tree, workers=2)
    assert same(threads.state, processes.state)
    assert untimed(threads.records) == untimed(processes.records)


@pytest.mark.slow
def test_a_convolutional_network_trains(tmp_path, tree, monkeypatch):
    small_resnet18(monkeypatch)
    result = run(tmp_path, data_dir=tree, arch="resnet18", depth=None, width=None, epochs=1)
    assert all(np.all(np.isfinite(s)) for s in jax.tree.leaves(result.state))


def test_images_that_cannot_be_read_are_counted_named_once_and_left_out(tmp_path, caplog):
    tree = write_tree(tmp_path / "imagenet", train=150, test=60)
    paths = sorted((tmp_path / "imagenet").glob("*/*/*.JPEG"))
    broken = [next(p for p in paths if p.parts[-3] == split) for split in ("train", "val")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:300])
    with caplog.at_level(logging.WARNING, "training"):
        result = run(tmp_path, data_dir=tree, train_bs=150, epochs=3)
    messages = [r.getMessage() for r in caplog.records if "cannot be read" in r.getMessage()]
    assert sorted(m.rsplit(" ", 1)[1] for m in messages) == sorted(map(str, broken))
    assert [record.unreadable for record in result.records] == [2, 2, 2]
    rates = [r.train_accuracy * 149 for r in result.records]
    np.testing.assert_allclose(rates, np.round(rates), atol=1e-4)
    rates = [r.test_accuracy * 59 for r in result.records]
    np.testing.assert_allclose(rates, np.round(rates), atol=1e-4)


@pytest.mark.parametrize("broken", [1, 33])
def test_more_unreadable_images_than_one_in_a_hundred_end_the_run(tmp_path, tree, broken):
    paths = sorted((tmp_path / "imagenet").glob("*/*/*.JPEG"), reverse=True)
    assert paths[0].parts[-3] == "val"
    for path in paths[:broken]:
        path.write_bytes(b"")
    # Of the 23 training images, an epoch takes 20.
    number = {1: 1, 33: 30}[broken]
    message = (
        f"{number} of 30 images of epoch 1 could not be decoded, more than 1%; there is no "
        "checkpoint before it"
    )
    with pytest.raises(ReadError, match=f"^{message}$"):
        run(tmp_path, data_dir=tree)
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_data_that_can_no_longer_be_read_end_the_run(tmp_path, tree, monkeypatch, workers):
    monkeypatch.setattr(streaming, "RETRY_SECONDS", (0.1,))

    def move_away():
        wait_for_epochs(tmp_path / "run", 2)
        os.rename(tmp_path / "imagenet", tmp_path / "elsewhere")

    thread = threading.Thread(target=move_away)
    thread.start()
    good = tmp_path / "run" / "checkpoints"
    message = f"^{tree}/.*: No such file or directory; the last good checkpoint is {good}/\\d+$"
    with pytest.raises(ReadError, match=message):
        run(tmp_path, data_dir=tree, workers=workers, epochs=10_000)
    thread.join()
    (best, last) = evaluate(
        TrainConfig(
            workdir=tmp_path / "run", eval_only=True, data_dir=tmp_path / "elsewhere", workers=0
        )
    )
    assert np.isfinite((best.loss, last.loss)).all()


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_with_what_may_be_the_reason(tmp_path, tree):
    def kill():
        wait_for_epochs(tmp_path / "run", 1)
        multiprocessing.active_children()[0].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(ReadError, match=r"^a worker process was killed, .*; the last good checkpo"):
        run(tmp_path, data_dir=tree, workers=1, epochs=10_000)
    thread.join()


class SignalWhenNamed(logging.Handler):
    """Asks the run to end as soon as a record is named that does not come."""

    message = None

    def emit(self, record):
        if "does not come" in record.getMessage() and self.message is None:
            self.message = record.getMessage()
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", pytest.param("val", marks=pytest.mark.slow)])
def test_a_read_that_never_returns_is_named_and_a_signal_still_saves(
    tmp_path, tree, monkeypatch, split
):
    # Reads are ahead of the run, which takes no signal before it has compiled.
    monkeypatch.setattr(streaming, "STALLED_SECONDS", 10)
    whole = run(tmp_path, "whole", data_dir=tree)
    path = min((tmp_path / "imagenet" / split).glob("*/*.JPEG"))
    image = path.read_bytes()
    path.unlink()
    os.mkfifo(path)  # Whoever opens it waits until somebody writes.
    handler = SignalWhenNamed()
    streaming.log.addHandler(handler)
    try:
        with pytest.raises(Stopped) as stopped:
            run(tmp_path, data_dir=tree)
    finally:
        streaming.log.removeHandler(handler)
        path.write_bytes(image)
    path.unlink()
    path.write_bytes(image)
    assert handler.message == f"{path}: has been read for 10 s, and does not come"
    assert stopped.value.stalled
    (saved,) = saved_steps(tmp_path / "run")
    # Four steps to an epoch, and the first test is after it.
    assert saved == 4 if split == "val" else saved < 4
    again = run(tmp_path, data_dir=tree)
    assert same(again.state, whole.state)
    assert untimed(again.records) == untimed(whole.records)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_whose_data_do_not_come_ends_on_a_signal(tmp_path, tree, workers):
    path = min((tmp_path / "imagenet" / "train").glob("*/*.JPEG"))
    path.unlink()
    os.mkfifo(path)
    flags = {**FIELDS, "workers": workers, "data_dir": tree, "workdir": tmp_path / "run"}
    process = start(
        "train.py", *(part for name in flags for part in (f"--{name}", flags[name])), cwd=ROOT
    )
    while "compiled in" not in process.stdout.readline():
        pass
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    _, err, code = finish(process, timeout=60)
    assert code == 143
    assert "stopped: SIGTERM after step " in err
    assert saved_steps(tmp_path / "run")


@pytest.mark.slow
def test_weight_zero_counts_for_nothing():
    config = TrainConfig(**(FIELDS | {"dataset": "synthetic_imagenet", "workers": None})).resolved()
    plan = make_plan(config, sharding.make_mesh(config))
    state = plan.create_train_state()
    rng = np.random.RandomState(0)
    images, labels = rng.randn(6, 16, 16, 3).astype(np.float32), rng.randint(0, 1000, 6)
    take = lambda batch: step.train_step(plan.graphdef, plan.tx, LOSSES["xent"], state, batch)

    four, sums = take(Batch(images[:4], labels[:4], jnp.ones(4)))
    six, padded = take(Batch(images, labels, jnp.array([1.0, 1, 1, 1, 0, 0])))
    for a, b in zip(jax.tree.leaves((four, sums)), jax.tree.leaves((six, padded)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    none, _ = take(Batch(images, labels, jnp.zeros(6)))
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(none.params))


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(tmp_path, tree, monkeypatch):
    original = step.train_step

    def train_step(*args):
        state, measured = original(*args)
        broken = jnp.where(state.step == 6, jnp.nan, measured.sums.loss)
        return state, measured._replace(sums=measured.sums._replace(loss=broken))

    monkeypatch.setattr(step, "train_step", train_step)
    with pytest.raises(NonFiniteError, match=r"^the loss was nan at step 6 \(epoch 2\)"):
        run(tmp_path, data_dir=tree, epochs=3)


def test_synthetic_images_need_no_data(tmp_path):
    result = run(tmp_path, dataset="synthetic_imagenet", data_dir=None, workers=None, epochs=1)
    (record,) = result.records
    assert record.step == 100
    assert record.unreadable == 0
    assert record.train_loss < np.log(1000)


@pytest.mark.slow
def test_bf16_keeps_everything_but_the_networks_arithmetic_in_float32(tmp_path):
    config = TrainConfig(
        **(
            FIELDS
            | {"dataset": "synthetic_imagenet", "arch": "resnet18", "depth": None, "width": None}
        )
        | {"precision": "bf16", "workers": None}
    ).resolved()
    plan = make_plan(config, sharding.make_mesh(config))
    state = plan.create_train_state()
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.batch_stats))} == {
        jnp.dtype(jnp.float32)
    }
    batch = Batch(
        jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32),
        jax.ShapeDtypeStruct((4,), jnp.int32),
        jax.ShapeDtypeStruct((4,), jnp.float32),
    )
    take = functools.partial(step.train_step, plan.graphdef, plan.tx, LOSSES["xent"])
    new, measured = jax.eval_shape(take, state, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves((new, measured))} == {
        jnp.dtype(jnp.float32),
        jnp.dtype(jnp.int32),  # the count of steps
    }
    program = jax.make_jaxpr(take)(state, batch)
    # What the network multiplies is bfloat16; norms, G and eta come after.
    heavy = [e for e in equations(program.jaxpr) if e.primitive.name == "conv_general_dilated"]
    assert heavy
    assert {v.aval.dtype for e in heavy for v in e.invars} == {jnp.dtype(jnp.bfloat16)}
    norms = [e for e in equations(program.jaxpr) if e.primitive.name in ("sqrt", "log", "rsqrt")]
    assert {v.aval.dtype for e in norms for v in e.invars} == {jnp.dtype(jnp.float32)}


def equations(jaxpr):
    """All the equations of a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)
