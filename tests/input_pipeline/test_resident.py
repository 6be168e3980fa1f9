import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from input_pipeline import resident
from input_pipeline.batch import normalise
from input_pipeline.sources import Split
from input_pipeline.specs import SPECS

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
    # A picture in which every pixel knows its place.
    picture = 1 + np.arange(32 * 32, dtype=np.int32).reshape(32, 32, 1)
    chosen = jnp.zeros(batch, jnp.int32)
    augmented = np.asarray(resident.crop_and_flip(jax.random.key(0), picture[None], chosen))

    padded = np.pad(picture[..., 0], 4)
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


def test_augmentation_takes_the_chosen_pictures_and_depends_on_its_key():
    images = jnp.arange(1, 17, dtype=jnp.uint8)[:, None, None, None] * jnp.ones(
        (8, 8, 3), jnp.uint8
    )
    chosen = jnp.array([3, 15, 0, 3])
    one, same, other = (
        resident.crop_and_flip(jax.random.key(k), images, chosen) for k in (0, 0, 1)
    )
    assert one.dtype == jnp.uint8
    assert one.shape == (4, 8, 8, 3)
    # Pictures of one colour each, of which no crop loses the middle.
    assert one[:, 4, 4, 0].tolist() == [4, 16, 1, 4]
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)
