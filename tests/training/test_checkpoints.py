import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from input_pipeline import resident
from input_pipeline.batch import normalise
from input_pipeline.specs import SPECS
from tests.helpers import ROOT, same, small_resnet18, untimed
from tests.training.test_resuming import RESIDENT
from training import checkpoints, export, metrics, sharding
from training import step as steps_of_training
from training.checkpoints import reading, saving
from training.config import TrainConfig
from training.data import load_data
from training.errors import ConfigError, NonFiniteError, SaveError
from training.feeds import make_feed
from training.plan import make_plan
from training.records import EpochRecord
from training.run import evaluate, train

FIELDS = RESIDENT | {"save_every": "20steps"}  # 44 steps an epoch
SIZES = (1437, 360)
CLASSES = [str(digit) for digit in range(10)]


def steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has ended, not to be changed."""
    workdir = tmp_path_factory.mktemp("trained")
    return train(TrainConfig(workdir=workdir, **FIELDS))


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of it."""
    workdir = tmp_path / "run"
    shutil.copytree(trained.workdir, workdir)
    return workdir


def best_step(records):
    return max(records, key=lambda r: r.test_accuracy).step


def test_the_newest_and_the_best_are_kept(tmp_path):
    fields = FIELDS | {"keep": 2, "epochs": 12}
    result = train(TrainConfig(workdir=tmp_path, **fields))
    kept = steps(tmp_path)
    assert kept[-2:] == [520, 528]
    assert set(kept) == {520, 528, best_step(result.records)}


@pytest.mark.slow
def test_the_best_epoch_is_kept_through_a_resumption(tmp_path, monkeypatch):
    # As if each epoch were worse than the one before.
    accuracies = iter([0.9, 0.8, 0.7, 0.6])
    original = metrics.averages

    def averages(sums):
        return original(sums) | {"accuracy": next(accuracies)}

    monkeypatch.setattr(metrics, "averages", averages)
    monkeypatch.setattr(
        metrics,
        "train_averages",
        lambda sums: dict.fromkeys(
            ["loss", "accuracy", "eta", "eta_min", "eta_max", "gradient_summary"], 0.0
        ),
    )
    for epochs in (2, 4):
        train(TrainConfig(workdir=tmp_path, **(FIELDS | {"keep": 1, "epochs": epochs})))
    assert steps(tmp_path) == [44, 176]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 17}, "--width 17: .* holds a run with --width 16; give that"),
        (
            {"arch": "vgg", "depth": None, "width": None},
            "--arch vgg16: .* holds a run with --arch fcn",
        ),
        ({"dataset": "synthetic_imagenet"}, "--dataset synthetic_imagenet: .* --dataset digits"),
        ({"seed": 1}, "--seed 1: .* --seed 0"),
        ({"loss": "xent"}, "--loss xent: .* --loss mse"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(copied, fields, message):
    before = steps(copied)
    if "dataset" in fields:
        fields |= {"image_size": 8}
    with pytest.raises(ConfigError, match=message):
        train(TrainConfig(workdir=copied, **(FIELDS | fields)))
    assert steps(copied) == before


def files_of(checkpoint):
    return sorted(p.relative_to(checkpoint) for p in checkpoint.rglob("*") if p.is_file())


SLOW = [pytest.param(damage, marks=pytest.mark.slow) for damage in ("deleted", "emptied")]


@pytest.mark.parametrize("damage", ["truncated", *SLOW])
def test_any_damaged_file_of_the_newest_checkpoint_is_survived(copied, trained, damage, caplog):
    """Some files can be done without; else the checkpoint before is the one to go on from."""
    config = TrainConfig(workdir=copied, **FIELDS).resolved()
    shapes = make_plan(config, sharding.make_mesh(config)).abstract_state
    zero_metrics = metrics.zero_train_metrics(jnp.float32)
    *_, before, newest = (copied / "checkpoints" / str(step) for step in steps(copied))
    pristine, fallbacks = copied.with_name("pristine"), 0
    shutil.copytree(copied, pristine)
    for name in files_of(newest):
        content = (newest / name).read_bytes()
        if damage == "deleted":
            (newest / name).unlink()
        else:
            (newest / name).write_bytes(
                content[: len(content) // 2 if damage == "truncated" else 0]
            )
        caplog.clear()
        with (
            caplog.at_level(logging.WARNING, "training"),
            saving.Saver(copied, config, SIZES, CLASSES) as saved,
        ):
            snapshot = saved.restore(shapes, zero_metrics)
        warned = [r.getMessage() for r in caplog.records if "cannot be read" in r.getMessage()]
        if warned:
            fallbacks += 1
            assert warned[0].startswith(f"{newest}: cannot be read (")
            assert snapshot.step == int(before.name)
            assert newest.with_name(newest.name + saving.DAMAGED).is_dir()
        else:
            assert same(snapshot.state, trained.state), name
            assert snapshot.records == trained.records
        shutil.rmtree(copied)
        shutil.copytree(pristine, copied)
    # The arrays and what describes them, at the least.
    assert fallbacks >= 6


def test_after_a_damaged_checkpoint_a_run_ends_as_it_would_have(copied, trained):
    newest = copied / "checkpoints" / str(steps(copied)[-1])
    shutil.rmtree(newest / "training")
    result = train(TrainConfig(workdir=copied, **FIELDS))
    assert same(result.state, trained.state)
    assert untimed(result.records) == untimed(trained.records)
    assert newest.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"records": "abc"}, {"records": [{}]}])
def test_what_no_run_saves_is_damage(copied, trained, changes):
    newest = copied / "checkpoints" / str(steps(copied)[-1])
    for _ in range(2):
        path = newest / "run" / "metadata"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        result = train(TrainConfig(workdir=copied, **FIELDS))
        assert same(result.state, trained.state)
    names = {p.name for p in newest.parent.iterdir()}
    assert {f"{newest.name}.damaged", f"{newest.name}.damaged-2"} <= names
    checkpoints.load(copied)


def test_another_data_set_of_the_same_name_is_refused(copied, monkeypatch):
    original = resident.load

    def load(*args):
        arrays = original(*args)
        return arrays._replace(train=resident.Split(*(x[:1000] for x in arrays.train)))

    monkeypatch.setattr(resident, "load", load)
    message = "--dataset digits: has 1000 and 360 images; .* holds a run on 1437 and 360"
    with pytest.raises(ConfigError, match=message):
        train(TrainConfig(workdir=copied, **FIELDS))


def test_a_save_that_fails_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    config = TrainConfig(workdir=tmp_path, **(FIELDS | {"keep": 1})).resolved()
    plan = make_plan(config, sharding.make_mesh(config))
    with contextlib.closing(make_feed(plan, load_data(config))) as feed:
        state, sums = feed.train(plan.create_train_state(), feed.zero_metrics(), 44)
        before = saving.Snapshot(44, state, sums, 1.0, [], {})
        after = dataclasses.replace(before, step=45, records=[EpochRecord(1, 45, *[0.0] * 10)])
        with saving.Saver(tmp_path, config, SIZES, CLASSES) as saver:
            assert saver.restore(plan.abstract_state, sums) is None
            saver.save(before)
            saver.finish()

            def fail(*args, **kwargs):
                raise ValueError("disk on fire")

            with monkeypatch.context() as patch:
                patch.setattr(saving.ocp.CheckpointManager, "save", fail)
                saver.save(after)
                with pytest.raises(SaveError, match="disk on fire"):
                    saver.finish()
            assert steps(tmp_path) == [44]
            saver.save(after)
            saver.finish()
        with saving.Saver(tmp_path, config, SIZES, CLASSES) as saver:
            assert saver.restore(plan.abstract_state, sums).records == after.records
            assert steps(tmp_path) == [45]


def make_unreadable(copied):
    """Makes one file of the newest checkpoint a link to itself, which no system can open.

    Returns:
      A function that undoes it.
    """
    files = copied.glob(f"checkpoints/{steps(copied)[-1]}/model/ocdbt.process_0/d/*")
    file = max(files, key=lambda file: file.stat().st_size)
    content = file.read_bytes()
    file.unlink()
    file.symlink_to(file)

    def repair():
        file.unlink()
        file.write_bytes(content)

    return repair


def test_a_checkpoint_that_the_system_cannot_read_is_not_damaged(copied, monkeypatch):
    monkeypatch.setattr(reading, "RETRY_SECONDS", [0])
    make_unreadable(copied)
    before = os.listdir(copied / "checkpoints")
    newest = copied / "checkpoints" / str(steps(copied)[-1])
    with pytest.raises(ConfigError, match=f"^{newest}: .*Too many levels of symbolic links$"):
        train(TrainConfig(workdir=copied, **FIELDS))
    assert os.listdir(copied / "checkpoints") == before


def test_a_checkpoint_that_the_system_could_not_read_is_read_again(copied, trained):
    repair = make_unreadable(copied)
    timer = threading.Timer(0.5, repair)
    timer.start()
    result = train(TrainConfig(workdir=copied, **FIELDS))
    timer.join()
    assert same(result.state, trained.state)


def test_when_no_checkpoint_can_be_read_nothing_is_trained(copied):
    for step in steps(copied):
        shutil.rmtree(copied / "checkpoints" / str(step) / "model")
    before = sorted((copied / "checkpoints").iterdir())
    with pytest.raises(ConfigError, match="none of its checkpoints can be read; --restart begins"):
        train(TrainConfig(workdir=copied, **FIELDS))
    assert sorted((copied / "checkpoints").iterdir()) == before
    train(TrainConfig(workdir=copied, **(FIELDS | {"restart": True, "epochs": 1})))
    assert steps(copied) == [20, 40, 44]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1], "the saved config cannot be understood"),
        ({"width": "16"}, "the saved config cannot be understood"),
        ({"optimiser": "adam"}, "the saved config cannot be understood (.* 'optimiser')"),
        ({"arch": "os.system"}, "--arch os.system: unknown"),
    ],
)
def test_a_saved_config_that_is_none_is_said(copied, config, message):
    for step in steps(copied):
        path = copied / "checkpoints" / str(step) / "run" / "metadata"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"config": config}))
    for use in (checkpoints.load, lambda w: train(TrainConfig(workdir=w, **FIELDS))):
        with pytest.raises(ConfigError, match=message):
            use(copied)


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_loaded_network_scores_what_the_run_says(copied, trained, which):
    model, config = checkpoints.load(copied, which)
    assert (config.arch, config.width) == ("fcn", 16)
    test = resident.load(SPECS["digits"]).test
    logits = model(normalise(SPECS["digits"], jnp.asarray(test.images), jnp.float32))
    accuracy = np.mean(np.argmax(logits, axis=1) == test.labels)
    records = {r.step: r for r in trained.records}
    step = best_step(trained.records) if which == "best" else trained.records[-1].step
    assert accuracy == pytest.approx(records[step].test_accuracy, abs=1e-6)


def test_evaluation_finds_what_training_found(copied, trained):
    records = {r.step: r for r in trained.records}
    best, last = evaluate(TrainConfig(workdir=copied, platform="cpu", test_bs=100))
    assert best.step == best_step(trained.records)
    assert last.step == trained.records[-1].step
    for tested in (best, last):
        record = records[tested.step]
        assert tested.epochs == record.epoch
        assert tested.loss == pytest.approx(record.test_loss, rel=1e-6)
        assert tested.accuracy == pytest.approx(record.test_accuracy, abs=1e-6)
    with pytest.raises(ConfigError, match=r"--width 17: .* --width 16"):
        evaluate(TrainConfig(workdir=copied, width=17))


@pytest.mark.slow
def test_evaluation_of_what_has_running_averages(tmp_path, monkeypatch):
    small_resnet18(monkeypatch)
    fields = {"arch": "resnet18", "dataset": "synthetic_imagenet", "image_size": 16}
    fields |= {"train_bs": 2, "test_bs": 2, "epochs": 1, "platform": "cpu"}
    config = TrainConfig(workdir=tmp_path, **fields).resolved()
    plan = make_plan(config, sharding.make_mesh(config))
    with contextlib.closing(make_feed(plan, load_data(config))) as feed:
        state, sums = feed.train(plan.create_train_state(), feed.zero_metrics(), 3)
        with saving.Saver(tmp_path, config, SIZES, CLASSES) as saver:
            saver.save(saving.Snapshot(3, state, sums, 1.0, [], feed.iterator_state()))
    model, _ = checkpoints.load(tmp_path)
    images = jnp.ones((2, 16, 16, 3))
    expected = nnx.merge(plan.graphdef, state.params, state.batch_stats)
    expected.eval()
    apply = nnx.jit(lambda model, images: model(images))
    np.testing.assert_array_equal(apply(model, images), apply(expected, images))
    assert not same(state.batch_stats, plan.create_train_state().batch_stats)


def test_export_is_every_parameter_and_average(copied, tmp_path):
    import safetensors.numpy

    file = tmp_path / "weights.safetensors"
    command = [sys.executable, "-m", "training.export", copied, file, "--which", "last"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == f"{file}: 3 tensors of the last checkpoint\n", run.stderr
    tensors = safetensors.numpy.load_file(file)
    model, _ = checkpoints.load(copied, "last")
    assert set(tensors) == {f"layers.{i}.kernel" for i in range(3)}
    for i, layer in enumerate(model.layers):
        np.testing.assert_array_equal(tensors[f"layers.{i}.kernel"], layer.kernel[...])

    command[3:5] = [tmp_path / "nothing", file]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == f"error: {tmp_path / 'nothing'}: holds no checkpoint\n"


def test_an_export_says_how_to_use_it(copied, trained, tmp_path):
    import safetensors

    file = tmp_path / "weights.safetensors"
    export.export(copied, file)
    with safetensors.safe_open(file, "numpy") as opened:
        facts = {name: json.loads(fact) for name, fact in opened.metadata().items()}
    assert facts.pop("config")["width"] == 16
    assert facts == {
        "step": best_step(trained.records),
        "classes": CLASSES,
        "image_shape": [8, 8, 1],
        "mean": [0.3054],
        "std": [0.3757],
        "dtype": "float32",
    }


def test_an_export_is_not_called_what_it_is_not(copied, tmp_path):
    with pytest.raises(ConfigError, match=r"w\.npz: is written as safetensors; give a name that"):
        export.export(copied, tmp_path / "w.npz")
    assert not list(tmp_path.glob("w*"))


def test_only_the_best_and_the_last_can_be_loaded(copied):
    with pytest.raises(ValueError, match="which='BEST': choose from best, last"):
        checkpoints.load(copied, "BEST")


def test_what_is_damaged_is_said_once_and_in_words(copied, caplog):
    (newest, *_) = reversed(steps(copied))
    manifest = copied / "checkpoints" / str(newest) / "model" / "manifest.ocdbt"
    manifest.write_bytes(b"x")
    shutil.rmtree(manifest.parent / "ocdbt.process_0")
    evaluate(TrainConfig(workdir=copied, platform="cpu"))
    (warning,) = (m for m in caplog.messages if "cannot be read" in m)
    assert "tensorstore_spec" not in warning
    assert re.search(r"manifest\.ocdbt\": Error decoding manifest: [\w ():]+\)$", warning)


def test_loading_needs_no_agd_jax(copied):
    code = (
        "import sys; from training import checkpoints; "
        f"checkpoints.load({os.fspath(copied)!r}); assert 'agd_jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


RESUME_AND_WATCH = """
import sys
from pathlib import Path
from training import checkpoints, run
from training.config import TrainConfig

config = TrainConfig(workdir=Path(sys.argv[1]), epochs=5, depth=3, width=16, train_bs=32)
seen, found = set(), []
def watch(event, arguments):
    seen.add(event)
    if event == "pickle.find_class":
        found.append(arguments)

sys.addaudithook(watch)
checkpoints.load(config.workdir)
assert len(run.train(config).records) == config.epochs
assert "open" in seen and not found, found
"""


@pytest.mark.slow
def test_nothing_of_a_workdir_is_unpickled(copied):
    subprocess.run([sys.executable, "-c", RESUME_AND_WATCH, copied], cwd=ROOT, check=True)


def test_a_bad_step_is_never_saved(tmp_path, monkeypatch):
    original = steps_of_training.train_step

    def train_step(*args):
        state, measured = original(*args)
        bad = jnp.where(state.step == 50, jnp.inf, measured.gradient_summary)
        return state, measured._replace(gradient_summary=bad)

    monkeypatch.setattr(steps_of_training, "train_step", train_step)
    good = tmp_path / "checkpoints" / "44"
    message = (
        r"^the gradient summary was inf at step 50 \(epoch 2\), after an eta of 0\.\d+; "
        f"the last good checkpoint is {good}$"
    )
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=message):
            train(TrainConfig(workdir=tmp_path, **(FIELDS | {"save_every": "10min"})))
        assert steps(tmp_path) == [44]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 3 MB, for those who may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs to be allowed to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_no_checkpoint_and_no_training(small_disk, caplog, tmp_path):
    workdir = small_disk / "run"
    fields = FIELDS | {"width": 128, "epochs": 1, "save_every": "10min"}
    train(TrainConfig(workdir=workdir, **fields))
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - 150_000)

    with pytest.raises(SaveError, match=r"cannot save in .*: .* MB needed, .* MB free"):
        train(TrainConfig(workdir=workdir, **(fields | {"epochs": 3, "save_every": "50steps"})))
    assert any("the checkpoints before this one stay" in r.getMessage() for r in caplog.records)
    assert steps(workdir) == [44]

    # Not a byte is free: an image can be done without, the record of an epoch cannot.
    with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as file:
        while True:
            file.write(bytes(100))
    with pytest.raises((SaveError, ConfigError), match="No space left on device"):
        train(TrainConfig(workdir=workdir, **(fields | {"epochs": 3})))
    assert steps(workdir) == [44]

    filler.unlink()
    result = train(TrainConfig(workdir=workdir, **(fields | {"epochs": 3})))
    whole = train(TrainConfig(workdir=tmp_path / "whole", **(fields | {"epochs": 3})))
    assert same(result.state, whole.state)
    assert untimed(result.records) == untimed(whole.records)
