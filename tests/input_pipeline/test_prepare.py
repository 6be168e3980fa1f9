"""Downloads, tried with archives of the true formats on a server of our own."""

import dataclasses
import functools
import gzip
import http.server
import io
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds

from input_pipeline import imagenet, prepare, resident
from input_pipeline.errors import DataError
from input_pipeline.specs import SPECS
from tests.images import small_images, write_tars


def mnist_archives(folder):
    for split, file, count in (("train", "train", 40), ("test", "t10k", 20)):
        images, labels = small_images("mnist", count, seed=len(split))
        pixels, classes = bytes(16) + images.tobytes(), bytes(8) + bytes(labels.tolist())
        for kind, content in (("images-idx3", pixels), ("labels-idx1", classes)):
            path = folder / f"{file}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(content))
            yield path.name


def cifar_archive(folder, name, batches, label_files):
    archive = f"{name}-binary.tar.gz"
    with tarfile.open(folder / archive, "w:gz") as tar:

        def add(file, content):
            info = tarfile.TarInfo(f"some-folder/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        for file, split, chosen in batches:
            count = 40 if split == "train" else 20
            images, labels = small_images(name, count, seed=len(split))
            # Bytes of a record: the labels, the fine one last, then three planes of colour.
            coarse = [bytes([label // 5]) if name == "cifar100" else b"" for label in labels]
            records = [
                c + bytes([label]) + image.transpose(2, 0, 1).tobytes()
                for c, label, image in zip(coarse, labels.tolist(), images, strict=True)
            ]
            add(file, b"".join(records[chosen]))
        for file, count in label_files.items():
            add(file, "".join(f"name{i}\n" for i in range(count)).encode() + b"\n")
    yield archive


ARCHIVES = {
    "mnist": mnist_archives,
    "cifar10": functools.partial(
        cifar_archive,
        name="cifar10",
        batches=[
            *((f"data_batch_{i + 1}.bin", "train", slice(8 * i, 8 * i + 8)) for i in range(5)),
            ("test_batch.bin", "test", slice(None)),
        ],
        label_files={"batches.meta.txt": 10},
    ),
    "cifar100": functools.partial(
        cifar_archive,
        name="cifar100",
        batches=[("train.bin", "train", slice(None)), ("test.bin", "test", slice(None))],
        label_files={"coarse_label_names.txt": 20, "fine_label_names.txt": 100},
    ),
}


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Returns a function that makes TFDS find a data set's archives on a server of our own."""
    tfds.disable_progress_bar()
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def serve(name):
        host = f"http://127.0.0.1:{server.server_port}"
        urls = {f"{host}/{file}": None for file in ARCHIVES[name](folder)}
        monkeypatch.setattr(tfds.core.DatasetBuilder, "url_infos", property(lambda _: urls))
        return folder

    yield serve
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_absent_data_set_is_downloaded_and_prepared_without_tensorflow(served, tmp_path, name):
    served(name)
    assert "tensorflow" not in sys.modules
    arrays = resident.load(SPECS[name], tmp_path / "data")
    assert "tensorflow" not in sys.modules
    for split, count in (("train", 40), ("test", 20)):
        images, labels = small_images(name, count, seed=len(split))
        found = getattr(arrays, split)
        # TFDS shuffles what it prepares.
        order = lambda x: np.lexsort(x.reshape(len(x), -1).T)
        np.testing.assert_array_equal(found.images[order(found.images)], images[order(images)])
        np.testing.assert_array_equal(found.labels[order(found.images)], labels[order(images)])
    builder = tfds.builder(SPECS[name].tfds_name, data_dir=tmp_path / "data")
    assert builder.info.splits["train"].num_examples == 40
    assert builder.info.file_format.value == "array_record"
    if name == "cifar100":
        assert builder.info.features["coarse_label"].num_classes == 20
        assert builder.info.features["label"].names[:2] == ["name0", "name1"]


def test_a_download_that_breaks_off_is_one_line(served, tmp_path):
    folder = served("mnist")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"^--data_dir .*: cannot prepare mnist there: .*$"):
        resident.load(SPECS["mnist"], tmp_path / "data")


def test_what_tfds_alone_can_prepare_is_one_line(tmp_path):
    spec = dataclasses.replace(SPECS["mnist"], name="letters", tfds_name="emnist")
    with pytest.raises(DataError, match=r"^--dataset letters: .*`tfds build emnist --data_dir"):
        resident.load(spec, tmp_path)


def test_preparing_by_itself_prints_where(served, tmp_path, capsys):
    served("mnist")
    prepare.main(prepare.Options("mnist", str(tmp_path / "data")))
    assert f"mnist is prepared in {tmp_path / 'data'}" in capsys.readouterr().out


def test_preparing_an_unknown_data_set_names_the_known():
    command = [sys.executable, "-m", "input_pipeline.prepare", "imagenette"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    known = ", ".join(prepare.PREPARED)
    assert run.stderr == f"error: imagenette: unknown; choose from {known}\n"


def test_imagenet_is_prepared_from_its_two_archives(tmp_path, capsys, caplog):
    train = {
        "n01440764": ["n01440764_1.JPEG", "n01440764_2.JPEG"],
        "n15075141": ["n15075141_9.JPEG"],
    }
    validation = ["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00050000.JPEG"]
    images = write_tars(tmp_path, train, validation)
    prepare.main(prepare.Options("imagenet", str(tmp_path / "data"), tars=tmp_path))
    assert "imagenet is prepared in" in capsys.readouterr().out
    assert "train has 3 images, and not 1281167; was an archive cut off?" in caplog.text
    # What is prepared needs no archives.
    prepare.prepare_imagenet(None, tmp_path / "data")

    sources, found = imagenet.find(SPECS["imagenet"], tmp_path / "data"), {}
    assert (len(sources.classes), sources.classes[0]) == (1000, "n01440764")
    for source in (sources.train, sources.test):
        for i in range(source.size):
            assert source[i].data == images[source.name(i)]
            found[source.name(i)] = source[i].label
    # The first and the last of the validation images are n01751748 and n02437616.
    assert found == {
        "n01440764_1.JPEG": 0,
        "n01440764_2.JPEG": 0,
        "n15075141_9.JPEG": 999,
        "ILSVRC2012_val_00000001.JPEG": 65,
        "ILSVRC2012_val_00050000.JPEG": 355,
    }


def test_archives_of_imagenet_that_are_missing_or_damaged_are_named(tmp_path):
    with pytest.raises(
        DataError, match=r"--tars None: has no ILSVRC2012_img_train.tar and no ILSV"
    ):
        prepare.prepare_imagenet(None, tmp_path / "data")
    write_tars(tmp_path, {"n01440764": ["n01440764_1.JPEG"]}, [])
    (tmp_path / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(DataError, match=r"has no ILSVRC2012_img_val.tar; download"):
        prepare.prepare_imagenet(tmp_path, tmp_path / "data")
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(b"an error page")
    with pytest.raises(DataError, match=r"ILSVRC2012_img_val.tar: truncated header"):
        prepare.prepare_imagenet(tmp_path, tmp_path / "data")
    write_tars(tmp_path, {"n01440764": ["n01440764_1.JPEG"]}, ["notes.txt"])
    with pytest.raises(DataError, match="cannot prepare imagenet there"):
        prepare.prepare_imagenet(tmp_path, tmp_path / "data")
    write_tars(tmp_path, {"dogs": ["dog.JPEG"]}, ["ILSVRC2012_val_00000001.JPEG"])
    with pytest.raises(DataError, match=r"cannot prepare imagenet there: .*dogs"):
        prepare.prepare_imagenet(tmp_path, tmp_path / "data")


def rewritten(path, change):
    """Writes an archive again, with what ``change`` makes of its ``(name, bytes)``."""
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    with tarfile.open(path, "w") as tar:
        for name, data in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_what_a_mac_adds_to_an_archive_is_passed_over(tmp_path):
    names = ["n01440764_1.JPEG", "n01440764_2.JPEG"]
    write_tars(tmp_path, {"n01440764": names}, ["ILSVRC2012_val_00000001.JPEG"])
    for path in tmp_path.glob("*.tar"):
        rewritten(path, lambda members: [(f"._{members[0][0]}", b"attributes"), *members])
    prepare.prepare_imagenet(tmp_path, tmp_path / "data")
    sources = imagenet.find(SPECS["imagenet"], tmp_path / "data")
    assert {sources.train.name(i) for i in range(sources.train.size)} == set(names)
    assert sources.test.size == 1


def test_a_class_that_an_archive_has_twice_is_named(tmp_path):
    write_tars(tmp_path, {"n01440764": ["n01440764_1.JPEG"]}, ["ILSVRC2012_val_00000001.JPEG"])
    rewritten(tmp_path / prepare.IMAGENET_TRAIN, lambda members: 2 * members)
    with pytest.raises(DataError, match=r"train\.tar: has n01440764\.tar twice"):
        prepare.prepare_imagenet(tmp_path, tmp_path / "data")


@pytest.mark.parametrize("damage", ["a header", "cut between images", "a header within a class"])
def test_an_archive_that_is_damaged_in_the_middle_is_named(tmp_path, damage):
    train = {"n01440764": ["n01440764_1.JPEG"], "n15075141": ["n15075141_9.JPEG"]}
    write_tars(tmp_path, train, ["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00050000.JPEG"])
    validation = tmp_path / prepare.IMAGENET_VALIDATION
    with tarfile.open(validation) as tar:
        second = tar.getmembers()[1].offset
    if damage == "a header within a class":
        change = lambda members: [
            (members[0][0], members[0][1].replace(b"n01440764_1", b"\xff" * 11, 1)),
            *members[1:],
        ]
        rewritten(tmp_path / prepare.IMAGENET_TRAIN, change)
        message = "n01440764"
    else:
        data = bytearray(validation.read_bytes())
        if damage == "a header":
            data[second : second + 100] = b"\xff" * 100
        else:
            del data[second:]
        validation.write_bytes(data)
        message = f"{validation}: is cut off or damaged at byte {second:,}"
    with pytest.raises(DataError, match=message):
        prepare.prepare_imagenet(tmp_path, tmp_path / "data")
