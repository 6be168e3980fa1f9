import io
import os
import tempfile

import filelock
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from input_pipeline.prepared import data_path
from tests.helpers import STARTED
from tests.images import small_images
from training.compilation_cache import MIN_SECONDS, reusing_cpu

# What earlier runs have compiled is not to decide how a test ends. But the tests of one run share
# what they compile, which saves a third of the time. JAX reads this when it is imported, here and
# in the processes that tests start.
if not reusing_cpu():
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
elif "PYTEST_XDIST_WORKER" not in os.environ:
    compiled = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(MIN_SECONDS)

# Most programs of the tests run for less time than XLA takes to optimise them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")


@pytest.fixture
def one_at_a_time(tmp_path_factory):
    """Tests with many processes, which two cores have no room for twice."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with filelock.FileLock(shared / "one_at_a_time.lock"):
        yield


def pytest_collection_modifyitems(items):
    """Puts these tests first: one worker begins with them, and the others need not wait for it."""
    items.sort(key=lambda item: "one_at_a_time" not in item.fixturenames)


# The same examples each time, but for some that are constants of whatever modules are loaded; and
# however long they take.
settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=50,
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.communicate()


@pytest.fixture
def prepared(tmp_path):
    """Returns a function that prepares a small TFDS folder: (name, train, test) -> data_dir."""

    def prepare(name, train=96, test=50, file_format="array_record"):
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()
        builder = tfds.builder(name, data_dir=tmp_path / "tfds", file_format=file_format)

        def examples(split, count):
            images, labels = small_images(name, count, seed=len(split))
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                png = io.BytesIO()
                Image.fromarray(image.squeeze()).save(png, format="png")
                png.seek(0)
                example = {"image": png, "label": label}
                if name.startswith("cifar"):
                    example["id"] = f"{split}_{i}"
                if name == "cifar100":
                    example["coarse_label"] = label // 5
                yield i, example

        splits = {"train": examples("train", train), "test": examples("test", test)}
        builder._split_generators = lambda _: splits
        builder.download_and_prepare()
        return tmp_path / "tfds"

    return prepare


@pytest.fixture
def real_data():
    """Returns a function that skips the test unless a prepared data set is found by default."""

    def require(name):
        folder = data_path() / name
        if not any(folder.glob("*/dataset_info.json")):
            pytest.skip(f"needs the real {name}, prepared in {folder.parent} (or $TFDS_DATA_DIR)")

    return require
