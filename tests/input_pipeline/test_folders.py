import logging
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from input_pipeline import folders, jpeg
from input_pipeline.errors import DataError
from tests.images import write_tree
from training.config import TrainConfig
from training.run import evaluate, train

CLASSES = ("dog", "cat", "eel")


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "data", train=60, test=15, synsets=CLASSES)


def spec_of(image_size=16, **options):
    return TrainConfig(dataset="image_folder", image_size=image_size, **options).spec


def config_of(tree, **options):
    return TrainConfig(
        dataset="image_folder",
        data_dir=os.fspath(tree),
        workdir=tree.parent / "run",
        **({"image_size": 16, "depth": 2, "width": 16, "train_bs": 20, "test_bs": 20} | options),
    )


def test_any_folder_of_images_is_a_data_set(tree):
    found = folders.find(tree)
    assert (found.train.size, found.test.size) == (60, 15)
    assert found.classes == ("cat", "dog", "eel")
    for source in (found.train, found.test):
        for i in range(source.size):
            path = Path(source.name(i))
            assert found.classes[source[i].label] == path.parent.name
            assert source[i].data == path.read_bytes()


def test_without_val_a_fixed_tenth_of_each_class_is_for_testing(tree, tmp_path, caplog):
    shutil.rmtree(tree / "val")
    copy = shutil.copytree(tree, tmp_path / "copy")
    (copy / "train" / "cat" / "more").mkdir()
    with caplog.at_level(logging.INFO, "input_pipeline"):
        here, there = (folders.find(root) for root in (tree, copy))
    assert "has no folder val; a tenth of each class of train is for testing" in caplog.text
    names = lambda source, root: {os.path.relpath(source.name(i), root) for i in range(source.size)}
    train, test = names(here.train, tree), names(here.test, tree)
    assert (names(there.train, copy), names(there.test, copy)) == (train, test)
    assert not train & test
    assert train | test == {os.path.relpath(path, tree) for path in tree.glob("train/*/*.JPEG")}
    assert (
        sorted(Path(name).parent.name for name in test) == ["cat"] * 2 + ["dog"] * 2 + ["eel"] * 2
    )


def test_a_class_too_small_to_be_split_is_named(tree):
    shutil.rmtree(tree / "val")
    write_tree(tree, train=1, test=0, synsets=("fox",))
    with pytest.raises(DataError, match=f"{tree}/train/fox: one image is too few"):
        folders.find(tree)


def test_what_is_no_such_folder_is_said(tree):
    with pytest.raises(DataError, match="~nosuchuser/x: the home folder of that user is unknown"):
        folders.find("~nosuchuser/x")
    with pytest.raises(DataError, match="a: File name too long"):
        folders.find(tree / (300 * "a"))
    with pytest.raises(DataError, match="has no folder train, with a folder for each class"):
        folders.find(tree / "train")
    write_tree(tree, train=0, test=1, synsets=("fox",))
    with pytest.raises(DataError, match="not trained on: fox; it knows cat, dog, eel"):
        folders.find(tree)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
def test_what_may_not_be_read_is_said(tree):
    (tree / "train" / "cat").chmod(0)
    with pytest.raises(DataError, match=f"--data_dir {tree}/train/cat: Permission denied$"):
        folders.find(tree)
    tree.chmod(0)
    with pytest.raises(DataError, match=f"--data_dir {tree}: Permission denied$"):
        folders.find(tree)


def test_few_images_are_held_whole_and_many_are_streamed(tree):
    found = folders.find(tree)
    assert folders.fits(spec_of(224), found)
    found.train.size = folders.RESIDENT_BYTES // (224 * 224 * 3)
    assert not folders.fits(spec_of(224), found)
    assert folders.fits(spec_of(64), found)


def test_images_are_decoded_as_they_are_for_testing(tree):
    found = folders.find(tree)
    arrays = folders.decoded(spec_of(), found)
    assert arrays.classes == found.classes
    for split, source in ((arrays.train, found.train), (arrays.test, found.test)):
        assert split.images.shape == (source.size, 16, 16, 3)
        for i in range(source.size):
            record = source[i]
            assert split.labels[i] == record.label
            image = jpeg.decode(record.data, jpeg.central_window, 16)
            np.testing.assert_array_equal(split.images[i], image)


def test_an_image_that_cannot_be_decoded_is_named_and_left_out(tree, caplog, monkeypatch):
    monkeypatch.setattr(folders, "MAX_UNREADABLE", 0.02)
    whole = folders.decoded(spec_of(), folders.find(tree))
    damaged = next((tree / "train" / "cat").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:100])
    arrays = folders.decoded(spec_of(), folders.find(tree))
    assert caplog.messages == [f"left out, as it cannot be read: {damaged}"]
    assert arrays.train.size == 59
    assert sum(arrays.train.labels == 0) == sum(whole.train.labels == 0) - 1
    monkeypatch.undo()
    with pytest.raises(DataError, match="1 of 60 images could not be decoded, more than 1%"):
        folders.decoded(spec_of(), folders.find(tree))


def test_pixels_are_normalised_as_imagenet_s_unless_told_otherwise():
    assert spec_of().mean == (0.485, 0.456, 0.406)
    spec = spec_of(mean=(0.5, 0.4, 0.3), std=(0.2, 0.1, 0.3))
    assert (spec.mean, spec.std) == ((0.5, 0.4, 0.3), (0.2, 0.1, 0.3))


@pytest.mark.slow
@pytest.mark.parametrize("held", [True, False], ids=["held", "streamed"])
def test_a_network_learns_goes_on_and_is_evaluated(tree, monkeypatch, held):
    if not held:
        monkeypatch.setattr(folders, "RESIDENT_BYTES", 0)
    config = config_of(tree, epochs=3, workers=0, mean=(0.5, 0.5, 0.5))
    first = train(config)
    assert jax.tree.leaves(first.state.params)[-1].shape == (16, 3)
    # With two of the three classes, whose labels stay theirs.
    shutil.rmtree(tree / "train" / "cat")
    shutil.rmtree(tree / "val" / "cat")
    last = evaluate(TrainConfig(eval_only=True, workdir=config.workdir, workers=0))[-1]
    assert last.accuracy == 1
    assert first.records[-1].test_accuracy == 1
