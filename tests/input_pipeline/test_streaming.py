import errno
import itertools
import json

import grain
import jax
import numpy as np
import pytest
from PIL import Image

from input_pipeline import imagenet, jpeg, streaming
from input_pipeline.errors import DataError
from input_pipeline.specs import DatasetSpec
from tests.images import encoded, photograph, write_tree

SIDE = 16
SPEC = DatasetSpec(
    "small",
    (SIDE, SIDE, 3),
    1000,
    (0.5,) * 3,
    (0.2,) * 3,
    tfds_name="imagenet2012",
    loader="imagenet",
)
TRAIN, TEST = 23, 10


class Memory:
    """A source whose records are given. Records that are None are damaged."""

    def __init__(self, images):
        self._images = images
        self.size = len(images)

    def __getitem__(self, index):
        if self._images[index] is None:
            raise jpeg.UnreadableError
        return imagenet.Record(self._images[index], index)

    def name(self, index):
        return f"image {index}"

    place = name


def memory(count):
    return Memory([encoded(photograph(30, 40, seed=i)) for i in range(count)])


@pytest.fixture
def one_device():
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


@pytest.fixture
def train_stream(one_device):
    """Opens training streams, and closes them when the test ends."""
    opened = []

    def open_stream(source, workers=0, seed=0, epochs=3, batch_size=5):
        stream = streaming.train_stream(
            SPEC,
            source,
            seed=seed,
            epochs=epochs,
            batch_size=batch_size,
            sharding=one_device,
            workers=workers,
        )
        opened.append(stream)
        return stream

    yield open_stream
    for stream in opened:
        stream.close()


def host(stream, count=None):
    return [jax.device_get(batch) for batch, _ in itertools.islice(stream, count)]


def same(a, b):
    return len(a) == len(b) and all(
        np.array_equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def test_an_epoch_is_a_permutation_of_its_own(train_stream):
    source = memory(TRAIN)
    batches = host(train_stream(source))
    assert len(batches) == 3 * (TRAIN // 5)
    epochs = np.array([b.labels for b in batches]).reshape(3, -1)
    for labels in epochs:
        assert len(set(labels)) == 20
    # Those left out are others each time.
    left = [frozenset(range(TRAIN)) - set(labels) for labels in epochs]
    assert len(set(left)) == 3
    assert not np.array_equal(epochs[0], epochs[1])
    for batch in batches:
        assert batch.images.shape == (5, SIDE, SIDE, 3)
        assert batch.images.dtype == np.uint8
        assert batch.labels.dtype == np.int32
        np.testing.assert_array_equal(batch.weights, np.ones(5, np.float32))


def test_the_seed_decides_everything(train_stream):
    source = memory(TRAIN)
    a, b, c = (host(train_stream(source, seed=seed)) for seed in (0, 0, 1))
    assert same(a, b)
    assert not same(a, c)


def test_workers_change_nothing(train_stream, tmp_path):
    source = imagenet.find(SPEC, write_tree(tmp_path, train=TRAIN, test=TEST)).train
    threads, one, three = (host(train_stream(source, workers)) for workers in (0, 1, 3))
    assert same(threads, one)
    assert same(threads, three)


@pytest.mark.parametrize(
    ("before", "after"), [(0, 0), (2, 0), (0, 2), pytest.param(2, 3, marks=pytest.mark.slow)]
)
def test_a_stream_goes_on_with_the_very_next_example(train_stream, tmp_path, before, after):
    source = imagenet.find(SPEC, write_tree(tmp_path, train=TRAIN, test=TEST)).train
    whole = host(train_stream(source))
    # At the start, in the first epoch, in the second; starting processes takes its time.
    for stop in (7,) if before or after else (0, 3, 7):
        stopped = train_stream(source, before)
        host(stopped, stop)
        # What waits in the buffers of the stopped stream has not been seen by a step.
        state = json.loads(json.dumps(stopped.get_state()))
        resumed = train_stream(source, after)
        resumed.set_state(state)
        assert same(host(resumed), whole[stop:])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_processes_read_the_rows_of_every_batch(count):
    source = memory(TRAIN)
    batch_size, epoch_size = 10, 20
    order = grain.MapDataset.range(TRAIN).shuffle(seed=0)[:epoch_size].repeat(2)
    examples = order.map_with_index(streaming.TrainExamples(source, 0, epoch_size, SIDE))
    read = lambda rows: iter(streaming.host_batches(examples, batch_size, rows, 0))
    every = np.arange(batch_size)
    whole = list(read(every))
    assert len(whole) == 4
    # Neighbours, or rows apart, as a mesh may have them.
    for rows in [*np.split(every, count), every[::count]]:
        iterator = read(rows)
        for number, batch in enumerate(whole, start=1):
            part = next(iterator)
            for name, array in batch.items():
                np.testing.assert_array_equal(part[name], array[rows])
            # The position is that of a process that reads all of them.
            assert iterator.get_state() == {"global_next_index": number * batch_size}


class OnDevices:
    """A sharding as a process sees it whose devices hold these rows."""

    def __init__(self, *rows):
        self._rows = rows

    def addressable_devices_indices_map(self, shape):
        assert len(shape) == 1
        return {device: (part,) for device, part in enumerate(self._rows)}


@pytest.mark.parametrize(
    ("on_devices", "rows"),
    [
        ([slice(None)], range(12)),
        ([slice(0, 3), slice(3, 6)], range(6)),
        ([slice(6, 9), slice(6, 9), slice(0, 3)], [0, 1, 2, 6, 7, 8]),
        # Eight do not divide twelve.
        ([slice(4, 8), slice(8, 12)], range(12)),
        ([slice(1, 6)], range(6)),
    ],
)
def test_a_process_reads_the_rows_on_its_devices(on_devices, rows):
    assert streaming.rows_of_process(OnDevices(*on_devices), 12).tolist() == list(rows)


def test_each_epoch_sees_another_window():
    make = streaming.TrainExamples(memory(1), seed=0, epoch_size=1, side=SIDE)
    images = [make(epoch, 0)["image"] for epoch in range(4)]
    assert len({image.tobytes() for image in images}) == 4
    assert make(2, 0)["image"].tobytes() == images[2].tobytes()


def test_half_of_the_images_are_mirrored():
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, :, 0] = np.linspace(0, 255, 40)
    source = Memory([encoded(Image.fromarray(pixels))])
    make = streaming.TrainExamples(source, seed=0, epoch_size=1, side=SIDE)
    rising = [
        bool(image[:, -1, 0].mean() > image[:, 0, 0].mean())
        for image in (make(epoch, 0)["image"] for epoch in range(400))
    ]
    assert np.mean(rising) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(("batch_size", "steps"), [(4, 3), (5, 2), (16, 1)])
def test_each_test_example_is_seen_once_a_round(one_device, batch_size, steps):
    stream = streaming.eval_stream(
        SPEC, memory(TEST), batch_size=batch_size, sharding=one_device, workers=0
    )
    batches = host(stream, 2 * steps)
    stream.close()
    for batches_of_round in (batches[:steps], batches[steps:]):
        labels = np.concatenate([b.labels[b.weights == 1] for b in batches_of_round])
        np.testing.assert_array_equal(labels, np.arange(TEST))
    assert same(batches[:steps], batches[steps:])
    image = jpeg.decode(encoded(photograph(30, 40, seed=0)), jpeg.central_window, SIDE)
    np.testing.assert_array_equal(batches[0].images[0], image)


def test_what_cannot_be_read_weighs_nothing_and_is_named(train_stream):
    images = [encoded(photograph(30, 40, seed=i)) for i in range(10)]
    images[3], images[7] = b"not an image", None
    stream = train_stream(Memory(images), epochs=2)
    unreadable = []
    for batch, bad in itertools.islice(stream, 2):
        weights = np.asarray(batch.weights)
        assert (weights == 0).sum() == len(bad)
        assert not np.asarray(batch.images)[weights == 0].any()
        unreadable += list(bad)
    assert sorted(unreadable) == [3, 7]


def test_a_record_that_the_system_could_not_read_is_read_again(monkeypatch):
    monkeypatch.setattr(streaming, "RETRY_SECONDS", (0, 0))
    image = encoded(photograph(9, 9))

    class Source:
        size = 1

        def __init__(self, failures):
            self.failures = failures

        def __getitem__(self, index):
            self.failures -= 1
            if self.failures >= 0:
                raise OSError(errno.EIO, "Input/output error")
            return streaming.Record(image, 7)

        def place(self, index):
            return "image.jpeg"

    example = streaming.EvalExamples(Source(failures=2), side=8)(0)
    assert (example["weight"], example["label"]) == (1, 7)
    with pytest.raises(DataError, match=r"^image\.jpeg: Input/output error$"):
        streaming.EvalExamples(Source(failures=3), side=8)(0)
