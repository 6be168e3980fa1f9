import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from input_pipeline.specs import SPECS
from models import ARCHITECTURES
from training.config import (
    ARCHS,
    DATASETS,
    LOSSES,
    MESH_AXES,
    NORMS,
    PLATFORMS,
    PRECISIONS,
    TrainConfig,
)
from training.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "none"}, rf"--dataset none: unknown; choose from {', '.join(SPECS)}$"),
        (
            {"dataset": "synthetic_imagenet", "workers": 3},
            r"--workers 3: is for imagenet, image_folder, not for synthetic_imagenet",
        ),
        (
            {"arch": "resnet18", "bn_group": 48},
            r"--bn_group 48: does not divide --train_bs 128; 0 is for the whole batch",
        ),
        ({"arch": "vgg", "bn_group": 256}, r"--bn_group 256: does not divide --train_bs 128"),
        ({"arch": "vgg", "bn_group": -1}, r"--bn_group -1: does not divide --train_bs 128"),
        ({"bn_group": 32}, r"--bn_group 32: is for vgg11, .*, resnet152, vgg, not for fcn"),
        ({"arch": "vit", "bn_group": 32}, r"--bn_group 32: is for vgg11, .*, not for vit"),
        ({"arch": "vit", "depth": 0}, r"--depth 0: is for fcn, not for vit"),
        ({"gain": float("nan")}, r"--gain nan: must be positive and finite"),
        ({"dataset": "imagenet", "workers": -1}, r"--workers -1: must be at least 0"),
        (
            {"image_size": 64},
            r"--image_size 64: is for imagenet, image_folder, synthetic_imagenet, not for digits",
        ),
        ({"dataset": "image_folder"}, r"--dataset image_folder: give its folder as --data_dir"),
        ({"mean": (0.5, 0.5, 0.5)}, r"--mean .*: is for image_folder, not for digits"),
        (
            {"dataset": "image_folder", "data_dir": "d", "std": (1.0, 0.0, 1.0)},
            r"--std .*: must be positive and finite",
        ),
        ({"save_every": "10"}, r"--save_every 10: give minutes or steps, as in 10min or 500steps"),
        ({"save_every": "0min"}, r"--save_every 0min: give minutes or steps"),
        ({"restart": True}, r"--restart: give the --workdir of the run that is to begin afresh"),
        (
            {"dataset": "mnist", "workers": 0},
            r"--workers 0: is for imagenet, image_folder, not for mnist",
        ),
        ({"mesh": "data"}, r"--mesh data: give sizes for some of data, fsdp, model"),
        ({"mesh": "rows=2"}, r"--mesh rows=2: give sizes"),
        ({"mesh": "data=2,data=2"}, r"--mesh data=2,data=2: give sizes for .* each once"),
        ({"mesh": "data=0"}, r"--mesh data=0: give sizes"),
        ({"mesh": "data=2;model=2"}, r"--mesh data=2;model=2: give sizes"),
        ({"mesh": ""}, r"--mesh : give sizes"),
        ({"process_id": 1}, r"--coordinator, --num_processes and --process_id: give all three"),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            r"--process_id 2: must be at least 0 and less than --num_processes 2",
        ),
        ({"seed": 2**32}, r"--seed 4294967296: must be at least 0 and less than 2\*\*32"),
    ],
)
def test_wrong_fields_are_named_with_what_would_work(fields, message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        TrainConfig(**fields).resolved()
    assert "\n" not in str(error.value)


CHOICES = {
    "arch": ARCHS,
    "dataset": DATASETS,
    "loss": LOSSES,
    "platform": PLATFORMS,
    "precision": PRECISIONS,
}


@given(name=st.sampled_from(sorted(CHOICES)), text=st.text())
def test_text_that_is_no_choice_is_refused_with_those_there_are(name, text):
    assume(text not in CHOICES[name])
    with pytest.raises(ConfigError) as error:
        TrainConfig(**{name: text}).resolved()
    assert str(error.value) == f"--{name} {text}: unknown; choose from {', '.join(CHOICES[name])}"


POSITIVE = ("train_bs", "test_bs", "epochs", "depth", "width", "image_size", "keep")


@given(name=st.sampled_from(POSITIVE), number=st.integers(max_value=0))
def test_what_is_counted_is_at_least_one(name, number):
    with pytest.raises(ConfigError, match=f"^--{name} {number}: must be at least 1$"):
        TrainConfig(**{"dataset": "imagenet", name: number}).resolved()


def test_loss_defaults_to_that_of_the_data_set():
    assert TrainConfig().resolved().loss == "mse"
    assert TrainConfig(loss="xent").resolved().loss == "xent"
    assert TrainConfig(dataset="imagenet").resolved().loss == "xent"


def test_the_size_of_images_is_that_of_the_data_set_or_as_asked():
    assert TrainConfig(dataset="imagenet").spec.image_shape == (224, 224, 3)
    assert TrainConfig(dataset="imagenet", image_size=64).spec.image_shape == (64, 64, 3)
    assert TrainConfig().spec.image_shape == (8, 8, 1)


MESHES = st.dictionaries(st.sampled_from(MESH_AXES), st.integers(1), min_size=1)


def as_flag(sizes):
    return ",".join(f"{name}={size}" for name, size in sizes.items())


@given(sizes=MESHES)
def test_a_mesh_is_read_in_any_order(sizes):
    axes = TrainConfig(mesh=as_flag(sizes)).mesh_axes
    assert axes == sizes
    assert list(axes) == [name for name in MESH_AXES if name in sizes]


def test_json_has_every_field():
    config = TrainConfig(workdir=Path("a/b")).resolved()
    stored = json.loads(json.dumps(config.to_json()))
    assert stored.keys() == {f.name for f in dataclasses.fields(TrainConfig)}
    assert stored["workdir"] == "a/b"
    assert stored["loss"] == "mse"
    assert stored["data_dir"] is None


def fields(**optional):
    return st.fixed_dictionaries({}, optional=optional)


COUNT = st.integers(1)
NETWORKS = (
    fields(depth=COUNT, width=COUNT)
    | fields(arch=st.sampled_from(ARCHS))
    | st.fixed_dictionaries(
        {"arch": st.sampled_from([a for a in ARCHS if "bn_group" in ARCHITECTURES[a].options])},
        optional={"bn_group": st.just(1)},
    )
)
COLOUR = st.tuples(*[st.floats(0, exclude_min=True, allow_infinity=False)] * 3)
OF_TREES = {"image_size": COUNT, "workers": st.integers(0)}
DATA = (
    fields(dataset=st.sampled_from(sorted({*DATASETS} - {"image_folder"})))
    | st.fixed_dictionaries(
        {"dataset": st.just("imagenet")}, optional=OF_TREES | {"data_dir": st.text()}
    )
    | st.fixed_dictionaries(
        {"dataset": st.just("image_folder"), "data_dir": st.text()},
        optional=OF_TREES | {"mean": COLOUR, "std": COLOUR, "num_classes": COUNT},
    )
)
REST = fields(
    loss=st.sampled_from(LOSSES),
    train_bs=COUNT,
    test_bs=COUNT,
    epochs=COUNT,
    norm=st.sampled_from(NORMS),
    gain=st.floats(0, exclude_min=True, allow_infinity=False),
    seed=st.integers(0, 2**32 - 1),
    workdir=st.text().map(Path),
    platform=st.sampled_from(PLATFORMS),
    mesh=MESHES.map(as_flag),
    precision=st.sampled_from(PRECISIONS),
    save_every=st.builds("{}{}".format, COUNT, st.sampled_from(["min", "steps"])),
    keep=COUNT,
    distribute=st.booleans(),
    verbose=st.booleans(),
)


@given(network=NETWORKS, data=DATA, rest=REST)
def test_json_and_back(network, data, rest):
    config = TrainConfig(**network, **data, **rest).resolved()
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.resolved() == config
    assert TrainConfig.from_json({}) == TrainConfig()


def test_a_run_with_other_options_is_another():
    config = TrainConfig(arch="resnet18").resolved()
    with pytest.raises(ConfigError, match=r"--depth 10: .* holds a run without --depth; give that"):
        TrainConfig(depth=10).check_same_run(config, ["depth"])
    with pytest.raises(ConfigError, match=r"--bn_group 32: .* holds a run with --bn_group 0; give"):
        TrainConfig(arch="resnet18", bn_group=32).resolved().check_same_run(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "--eval_only: give the --workdir of the run that is meant"),
        ({"restart": True}, "--restart: would leave --eval_only nothing to test"),
    ],
)
def test_what_an_evaluation_cannot_follow_is_refused(fields, message):
    workdir = Path("run") if fields else None
    with pytest.raises(ConfigError, match=f"^{message}"):
        TrainConfig(workdir=workdir, **fields).to_evaluate()


def test_what_is_saved_by_minutes_or_by_steps():
    assert TrainConfig(save_every="2min").save_interval == (120, None)
    assert TrainConfig(save_every="500steps").save_interval == (float("inf"), 500)


@pytest.mark.parametrize(
    ("fields", "others"),
    [
        ({"arch": "vgg"}, {"arch": "vgg16"}),
        ({"dataset": "imagenet"}, {"dataset": "imagenet", "image_size": 224}),
        ({"dataset": "imagenet"}, {"dataset": "imagenet", "loss": "xent"}),
        ({}, {"depth": 10, "width": 256}),
    ],
)
def test_what_means_the_same_is_the_same_run(fields, others):
    config = TrainConfig(**fields).resolved()
    assert config == TrainConfig(**others).resolved()
    TrainConfig(workdir="run", eval_only=True, **others).to_evaluate().check_same_run(
        config, others
    )
