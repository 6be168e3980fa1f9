import dataclasses
import json
from pathlib import Path

import pytest

from training.config import TrainConfig
from training.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arch": "resnext"}, r"--arch resnext: unknown; choose from .*fcn"),
        ({"dataset": "svhn"}, r"--dataset svhn: unknown; choose from digits, mnist, cifar10"),
        ({"loss": ""}, r"--loss : unknown; choose from mse, xent"),
        (
            {"dataset": "synthetic_imagenet", "workers": 3},
            r"--workers 3: is for imagenet, not for synthetic_imagenet",
        ),
        ({"loss": "hinge"}, r"--loss hinge: unknown; choose from mse, xent"),
        ({"platform": "npu"}, r"--platform npu: unknown; choose from cpu, gpu, tpu"),
        ({"precision": "f8"}, r"--precision f8: unknown; choose from f32, bf16, f64"),
        ({"width": 0}, r"--width 0: must be at least 1"),
        ({"depth": -3}, r"--depth -3: must be at least 1"),
        ({"epochs": 0}, r"--epochs 0: must be at least 1"),
        ({"train_bs": 0}, r"--train_bs 0: must be at least 1"),
        ({"test_bs": -1}, r"--test_bs -1: must be at least 1"),
        ({"gain": float("nan")}, r"--gain nan: must be positive and finite"),
        ({"dataset": "imagenet", "image_size": 0}, r"--image_size 0: must be at least 1"),
        ({"dataset": "imagenet", "workers": -1}, r"--workers -1: must be at least 0"),
        (
            {"image_size": 64},
            r"--image_size 64: is for imagenet and synthetic_imagenet, not for digits",
        ),
        ({"save_every": "10"}, r"--save_every 10: give minutes or steps, as in 10min or 500steps"),
        ({"save_every": "0min"}, r"--save_every 0min: give minutes or steps"),
        ({"keep": 0}, r"--keep 0: must be at least 1"),
        ({"restart": True}, r"--restart: give the --workdir of the run that is to begin afresh"),
        ({"dataset": "mnist", "workers": 0}, r"--workers 0: is for imagenet, not for mnist"),
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


def test_loss_defaults_to_that_of_the_data_set():
    assert TrainConfig().resolved().loss == "mse"
    assert TrainConfig(loss="xent").resolved().loss == "xent"
    assert TrainConfig(dataset="imagenet").resolved().loss == "xent"


def test_the_size_of_images_is_that_of_the_data_set_or_as_asked():
    assert TrainConfig(dataset="imagenet").spec.image_shape == (224, 224, 3)
    assert TrainConfig(dataset="imagenet", image_size=64).spec.image_shape == (64, 64, 3)
    assert TrainConfig().spec.image_shape == (8, 8, 1)


def test_a_mesh_is_read_in_any_order():
    assert TrainConfig(mesh="model=2,data=4").mesh_axes == {"data": 4, "model": 2}
    assert TrainConfig(mesh="fsdp=16").mesh_axes == {"fsdp": 16}
    assert TrainConfig().mesh_axes is None


def test_json_has_every_field():
    config = TrainConfig(workdir=Path("a/b")).resolved()
    stored = json.loads(json.dumps(config.to_json()))
    assert stored.keys() == {f.name for f in dataclasses.fields(TrainConfig)}
    assert stored["workdir"] == "a/b"
    assert stored["loss"] == "mse"
    assert stored["data_dir"] is None


def test_json_and_back():
    config = TrainConfig(workdir=Path("runs/a"), gain=2, restart=True, image_size=None)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert TrainConfig.from_json({}) == TrainConfig()


def test_a_config_of_before_depth_was_of_fcn_alone_is_read():
    old = TrainConfig(arch="resnet18").to_json() | {"depth": 10, "width": 256}
    config = TrainConfig.from_json(old).resolved()
    config.check_same_run(TrainConfig(arch="resnet18").resolved())
    with pytest.raises(ConfigError, match=r"--depth 10: .* holds a run without --depth; give that"):
        TrainConfig(depth=10).check_same_run(config, ["depth"])


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
