import collections
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from input_pipeline import prepared as prepared_data
from input_pipeline import resident
from input_pipeline.batch import normalise
from input_pipeline.errors import DataError
from input_pipeline.resident import Split
from input_pipeline.specs import SPECS


def equal(a, b):
    return all(
        np.array_equal(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True)
    )


def test_digits_are_complete_and_normalised_by_their_own_statistics():
    spec, arrays = SPECS["digits"], resident.load(SPECS["digits"])
    assert arrays.train.images.shape == (1437, 8, 8, 1)
    assert arrays.test.images.shape == (360, 8, 8, 1)
    assert arrays.train.images.dtype == np.uint8
    assert arrays.train.images.max() == 255
    assert arrays.classes == tuple("0123456789")
    for split in (arrays.train, arrays.test):
        assert set(split.labels) == set(range(10))
    pixels = arrays.train.images / 255
    assert spec.mean == pytest.approx((pixels.mean(),), abs=1e-3)
    assert spec.std == pytest.approx((pixels.std(),), abs=1e-3)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_prepared_records_are_read_as_they_were_written(prepared, name):
    data_dir = prepared(name, train=30, test=20)
    arrays = resident.load(SPECS[name], data_dir)
    assert arrays.train.images.shape == (30, *SPECS[name].image_shape)
    assert arrays.test.images.shape == (20, *SPECS[name].image_shape)
    # The class is the brightness, whatever the order of the records.
    brightness = arrays.train.images.mean(axis=(1, 2, 3))
    expected = 27.5 + 200 * arrays.train.labels // SPECS[name].num_classes
    np.testing.assert_allclose(brightness, expected, atol=6)


def test_the_second_start_reads_the_cache_and_decodes_nothing(prepared, monkeypatch):
    data_dir = prepared("mnist")
    first = resident.load(SPECS["mnist"], data_dir)
    monkeypatch.setattr(resident, "_decode", None)
    assert equal(first, resident.load(SPECS["mnist"], data_dir))


def test_a_cache_of_other_data_is_not_used(prepared, monkeypatch):
    data_dir = prepared("mnist")
    first = resident.load(SPECS["mnist"], data_dir)
    (record,) = data_dir.glob("mnist/*/*train.array_record*")
    later = record.stat().st_mtime_ns + 1_000_000
    os.utime(record, ns=(later, later))
    calls = []
    decode = resident._decode
    monkeypatch.setattr(resident, "_decode", lambda *a: calls.append(a[2]) or decode(*a))
    assert equal(first, resident.load(SPECS["mnist"], data_dir))
    assert calls == ["train", "test"]


@pytest.mark.parametrize("damage", ["truncated", "a byte changed", "empty", "not an archive"])
def test_a_damaged_cache_is_rebuilt(prepared, caplog, damage):
    data_dir = prepared("mnist")
    first = resident.load(SPECS["mnist"], data_dir)
    (cache,) = data_dir.glob("mnist/decoded-*.npz")
    content = bytearray(cache.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "a byte changed":
        content[len(content) // 2] ^= 1
    else:
        content = b"" if damage == "empty" else b"nothing of use"
    cache.write_bytes(content)
    assert equal(first, resident.load(SPECS["mnist"], data_dir))
    assert "decoding again" in caplog.text
    caplog.clear()
    assert equal(first, resident.load(SPECS["mnist"], data_dir))
    assert "decoding again" not in caplog.text


def test_two_processes_that_start_at_once_decode_once(prepared):
    data_dir = prepared("mnist", train=3000)
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO)\n"
        "from input_pipeline import resident; from input_pipeline.specs import SPECS\n"
        "print(resident.load(SPECS['mnist'], sys.argv[1]).train.images.sum())"
    )
    start = lambda: subprocess.Popen(
        [sys.executable, "-c", code, data_dir],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    outputs = [process.communicate(timeout=120) for process in (start(), start())]
    assert outputs[0][0] == outputs[1][0] != ""
    assert sum(errors.count("decoding mnist once") for _, errors in outputs) == 1
    assert not list(data_dir.glob("mnist/*.partial"))


def cut(folder):
    (shard,) = folder.glob("*train.array_record*")
    os.truncate(shard, shard.stat().st_size // 2)


def change_a_byte(folder):
    (shard,) = folder.glob("*train.array_record*")
    data = bytearray(shard.read_bytes())
    data[100] ^= 255
    shard.write_bytes(data)


def name_a_module(folder):
    text = (folder / "features.json").read_text()
    (folder / "features.json").write_text(text.replace("tensorflow_datasets.core", "antigravity"))


DAMAGE = {
    cut: "Corrupted",
    change_a_byte: "Corrupted",
    lambda folder: [path.unlink() for path in folder.glob("*train.array_record*")]: "No such file",
    lambda folder: (folder / "dataset_info.json").write_text(""): "Expecting value",
    lambda folder: (folder / "features.json").write_text(""): "Expecting value",
    lambda folder: (folder / "dataset_info.json").write_text('{"new": 1}'): 'no field named "new"',
    name_a_module: "features.json names antigravity.*, which is not TFDS's own",
}


def test_a_label_of_no_class_is_said(prepared, monkeypatch):
    data_dir = prepared("cifar10")
    spec = dataclasses.replace(SPECS["cifar10"], num_classes=7)
    monkeypatch.setattr(prepared_data, "class_names", lambda *_: tuple("abcdefg"))
    with pytest.raises(DataError, match="has a label that is not 0 to 6; prepare it again"):
        resident.load(spec, data_dir)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_a_prepared_folder_is_one_line(prepared, damage):
    data_dir = prepared("mnist")
    (folder,) = Path(data_dir).glob("mnist/*")
    damage(folder)
    message = f"^--data_dir {data_dir}: mnist is there, but cannot be read .*{DAMAGE[damage]}.*$"
    with pytest.raises(DataError, match=message):
        resident.load(SPECS["mnist"], data_dir)
    assert "antigravity" not in sys.modules


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_decoded_without_a_cache(prepared, caplog):
    data_dir = prepared("mnist")
    for folder in (data_dir, data_dir / "mnist"):
        folder.chmod(0o500)
    assert len(resident.load(SPECS["mnist"], data_dir).train.labels) == 96
    assert "the next start decodes again" in caplog.text


def test_a_cache_that_cannot_be_written_is_done_without(prepared, caplog, monkeypatch):
    data_dir = prepared("mnist")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resident.np, "savez", full)
    assert len(resident.load(SPECS["mnist"], data_dir).train.labels) == 96
    assert "the next start decodes again" in caplog.text
    assert "No space left" in caplog.text
    assert not list(data_dir.glob("mnist/decoded*"))


def test_absent_and_unreachable_is_said_quickly_with_what_to_do(tmp_path, monkeypatch):
    # A name that is looked up for ever, as on a node behind a silent firewall.
    monkeypatch.setattr("requests.head", lambda *_, **__: time.sleep(60))
    monkeypatch.setattr(prepared_data, "PROBE_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(
        DataError, match=r"--dataset cifar100: not prepared in .*nowhere.*"
    ) as error:
        resident.load(SPECS["cifar100"], tmp_path / "nowhere")
    assert time.monotonic() - start < 10
    assert "./run prepare cifar100 --data_dir DIR" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "nowhere").exists()


def test_a_copy_that_needs_tensorflow_is_named(tmp_path):
    # What TFDS leaves when it prepares in its own default format.
    import tensorflow_datasets as tfds

    builder = tfds.builder("mnist", data_dir=tmp_path, file_format="tfrecord")
    builder.info.set_splits(tfds.core.SplitDict([]))
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    builder.info.write_to_directory(folder)
    with pytest.raises(DataError, match=r"--data_dir .*: mnist is there as tfrecord"):
        resident.load(SPECS["mnist"], tmp_path)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_real_data_has_the_statistics_it_is_normalised_by(real_data, name):
    real_data(name)
    spec, arrays = SPECS[name], resident.load(SPECS[name])
    assert len(arrays.test.labels) == 10_000
    pixels = arrays.train.images
    assert spec.mean == pytest.approx(pixels.mean(axis=(0, 1, 2)) / 255, abs=2e-4)
    # CIFAR's usual divisors are means of the images' own deviations, and so a little smaller.
    assert spec.std == pytest.approx(pixels.std(axis=(0, 1, 2)) / 255, rel=0.25)


DIGITS, CIFAR = SPECS["digits"], SPECS["cifar10"]


def split_of(spec, count):
    images = np.random.RandomState(0).randint(0, 256, (count, *spec.image_shape), np.uint8)
    return Split(jnp.asarray(images), jnp.arange(count, dtype=jnp.int32))


def test_an_epoch_is_a_permutation_of_its_own():
    key = jax.random.key(0)
    orders = [resident.epoch_order(key, epoch, 100).tolist() for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(100))
    assert orders[0] != orders[1] != orders[2]
    assert orders[1] == resident.epoch_order(key, 1, 100).tolist()


def test_training_batches_of_an_epoch_do_not_overlap():
    split = split_of(DIGITS, 50)
    order = resident.epoch_order(jax.random.key(0), 0, 50)
    make = jax.jit(
        lambda i: resident.train_batch(DIGITS, split, order, i, jax.random.key(0), 8, jnp.float32)
    )
    labels = np.concatenate([make(i).labels for i in range(6)])
    assert len(set(labels.tolist())) == 48
    batch = make(0)
    images = np.asarray(split.images)[np.asarray(batch.labels)]
    expected = (images / 255 - DIGITS.mean[0]) / DIGITS.std[0]
    np.testing.assert_allclose(batch.images, expected, atol=1e-5)
    assert batch.images.dtype == jnp.float32
    assert batch.weights.tolist() == [1] * 8


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16])
def test_every_test_example_is_seen_once(count):
    split = split_of(DIGITS, count)
    seen = collections.Counter()
    for i in range(-(-count // 8)):
        batch = resident.eval_batch(DIGITS, split, i, 8, jnp.float32)
        assert len(batch.labels) == 8
        for label, weight in zip(batch.labels.tolist(), batch.weights.tolist(), strict=True):
            seen[label] += weight
    assert seen == dict.fromkeys(range(count), 1)


def test_colours_are_normalised_channel_by_channel():
    images = jnp.full((1, 2, 2, 3), 51, jnp.uint8)
    pixel = normalise(CIFAR, images, jnp.float32)[0, 0, 0]
    expected = (0.2 - np.array(CIFAR.mean)) / np.array(CIFAR.std)
    np.testing.assert_allclose(pixel, expected, rtol=1e-5)


def test_augmentation_is_a_padded_crop_and_a_flip_each_as_likely_as_the_others():
    batch = 20_000
    # An image in which every pixel knows its place.
    image = 1 + np.arange(32 * 32, dtype=np.int32).reshape(32, 32, 1)
    chosen = jnp.zeros(batch, jnp.int32)
    augmented = np.asarray(resident.crop_and_flip(jax.random.key(0), image[None], chosen))

    padded = np.pad(image[..., 0], 4)
    crops = {}
    for y in range(9):
        for x in range(9):
            crop = padded[y : y + 32, x : x + 32]
            crops[crop.tobytes()] = (y, x, False)
            crops[crop[:, ::-1].tobytes()] = (y, x, True)
    assert len(crops) == 9 * 9 * 2
    found = collections.Counter(crops[a[..., 0].tobytes()] for a in augmented)
    assert len(found) == 9 * 9 * 2
    counts = np.array(list(found.values()))
    chi2 = np.sum((counts - batch / 162) ** 2 / (batch / 162))
    assert chi2 < 240  # 161 degrees of freedom: exceeded by chance in 1 of 20,000


def test_augmentation_takes_the_chosen_images_and_depends_on_its_key():
    images = jnp.arange(1, 17, dtype=jnp.uint8)[:, None, None, None] * jnp.ones(
        (8, 8, 3), jnp.uint8
    )
    chosen = jnp.array([3, 15, 0, 3])
    one, same, other = (
        resident.crop_and_flip(jax.random.key(k), images, chosen) for k in (0, 0, 1)
    )
    assert one.dtype == jnp.uint8
    assert one.shape == (4, 8, 8, 3)
    # Images of one colour each, of which no crop loses the middle.
    assert one[:, 4, 4, 0].tolist() == [4, 16, 1, 4]
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)
