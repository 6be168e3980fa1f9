import io
import logging
import os
import re
import shutil
from pathlib import Path

import pytest

from input_pipeline import cloud, folders, imagenet, jpeg
from input_pipeline.errors import DataError
from input_pipeline.specs import SPECS
from tests.helpers import ROOT, finish, start
from tests.images import LABELS, SYNSETS, encoded, photograph, write_tree

SPEC = SPECS["imagenet"]


@pytest.fixture
def prepared_imagenet(tmp_path):
    """Returns a function that prepares a small imagenet2012 as TFDS does: () -> data_dir."""

    def prepare(file_format="array_record", splits=("train", "validation"), count=7, shards=1):
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()
        root = tmp_path / "tfds"
        builder = tfds.builder("imagenet2012", data_dir=root, file_format=file_format)

        def examples(split):
            for i in range(count):
                name = f"{split}_{i}.JPEG"
                image = io.BytesIO(encoded(photograph(40, 50, seed=i)))
                yield name, {"image": image, "label": SYNSETS[i % 3], "file_name": name}

        builder._split_generators = lambda _: {split: examples(split) for split in splits}
        config = tfds.download.DownloadConfig(num_shards=shards)
        builder.download_and_prepare(download_config=config)
        return root

    return prepare


def test_array_records(prepared_imagenet):
    sources = imagenet.find(SPEC, prepared_imagenet())
    assert (sources.train.size, sources.test.size) == (7, 7)
    for source, split in ((sources.train, "train"), (sources.test, "validation")):
        # TFDS stores them in an order of its own.
        assert {source.name(i) for i in range(7)} == {f"{split}_{i}.JPEG" for i in range(7)}
        for i in range(7):
            number = int(source.name(i).split("_")[1].split(".")[0])
            record = source[i]
            assert record.label == LABELS[number % 3]
            assert record.data == encoded(photograph(40, 50, seed=number))


def test_a_folder_tree(tmp_path):
    root = write_tree(tmp_path, train=7, test=4)
    (root / "train" / SYNSETS[0] / ".DS_Store").write_bytes(b"")
    (root / "train" / "notes.txt").write_text("")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / ".ipynb_checkpoints" / "a.JPEG").write_bytes(b"")
    train, test, classes = imagenet.find(SPEC, root)
    assert (train.size, test.size) == (7, 4)
    assert [classes[label] for label in LABELS] == list(SYNSETS)
    for source in (train, test):
        for i in range(source.size):
            path = source.name(i)
            assert source[i].label == LABELS[SYNSETS.index(path.split(os.sep)[-2])]
            assert source[i].data == Path(path).read_bytes()


def test_folders_that_are_not_of_imagenet_are_numbered_in_order(tmp_path):
    root = write_tree(tmp_path, train=4, test=3, synsets=("dog", "cat", "eel"))
    train, test, classes = imagenet.find(SPEC, root)
    assert classes == ("cat", "dog", "eel")
    assert [train[i].label for i in range(4)] == [0, 1, 1, 2]
    assert [test[i].label for i in range(3)] == [0, 1, 2]


def test_folders_named_by_numbers_are_in_the_order_of_these_and_it_says_so(tmp_path, caplog):
    root = write_tree(tmp_path, train=3, test=3, synsets=("10", "9", "1"))
    with caplog.at_level(logging.INFO, "input_pipeline"):
        assert imagenet.find(SPEC, root).classes == ("1", "9", "10")
    assert caplog.messages == [f"--data_dir {root}: the classes are numbers, and in their order"]


def test_labels_are_those_of_the_classes_that_are_known(tmp_path):
    root = write_tree(tmp_path, train=4, test=3, synsets=("eel", "cat"))
    train, test, classes = imagenet.find(SPEC, root, known=["cat", "dog", "eel"])
    assert classes == ("cat", "dog", "eel")
    assert [train[i].label for i in range(4)] == [0, 0, 2, 2]
    assert [test[i].label for i in range(3)] == [0, 2, 2]
    message = "not trained on: cat, eel; it knows ant, bee, cow, dog, elk and 1 more"
    with pytest.raises(DataError, match=message):
        imagenet.find(SPEC, root, known=["ant", "bee", "cow", "dog", "elk", "fox"])


def test_labels_of_array_records_are_those_of_the_classes_that_are_known(prepared_imagenet):
    root = prepared_imagenet()
    train, _, classes = imagenet.find(SPEC, root)
    again, _, known = imagenet.find(SPEC, root, known=classes[::-1])
    assert known == classes[::-1]
    assert [999 - train[i].label for i in range(7)] == [again[i].label for i in range(7)]
    with pytest.raises(DataError, match="has classes that this run was not trained on: n01440764"):
        imagenet.find(SPEC, root, known=["cat", "dog"])


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_without_images_is_named(tmp_path, split):
    root = write_tree(tmp_path, train=4, test=3, synsets=("dog", "cat"))
    (root / split / "eel").mkdir()
    (root / split / "eel" / "image.psd").write_bytes(b"")
    with pytest.raises(DataError, match=f"{root}/{split}/eel: a class without images"):
        imagenet.find(SPEC, root)
    shutil.rmtree(root / split / "eel")
    (root / split / "eel").symlink_to("/nowhere")
    with pytest.raises(DataError, match=f"{root}/{split}/eel: a link that leads nowhere"):
        imagenet.find(SPEC, root)


def test_images_are_what_the_decoder_reads(tmp_path):
    root = write_tree(tmp_path, train=1, test=1, synsets=("dog",))
    for i, suffix in enumerate(folders.SUFFIXES):
        path = root / "train" / "dog" / f"{i}{suffix.upper()}"
        photograph(30, 20, seed=1).save(path)
    source = imagenet.find(SPEC, root).train
    assert source.size == 1 + len(folders.SUFFIXES)
    for i in range(source.size):
        whole = lambda height, width: jpeg.Window(0, 0, height, width)
        assert jpeg.decode(source[i].data, whole, 8).shape == (8, 8, 3)


def test_other_folders_beside_those_of_imagenet_are_named(tmp_path):
    root = write_tree(tmp_path, train=4, test=3)
    write_tree(tmp_path, train=1, test=1, synsets=("@eaDir",))
    with pytest.raises(DataError, match="beside them @eaDir; move these away"):
        imagenet.find(SPEC, root)


def test_a_damaged_record_is_named_and_a_missing_file_is_said(prepared_imagenet):
    root = prepared_imagenet(count=40)
    (shard,) = root.glob("imagenet2012/*/*train.array_record*")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    shard.write_bytes(data)
    source = imagenet.find(SPEC, root).train
    damaged = []
    for i in range(source.size):
        try:
            assert source[i].data.startswith(b"\xff\xd8")
            assert source.name(i).startswith("train_")
        except jpeg.UnreadableError:
            damaged.append(i)
            assert source.name(i) == f"record {i} of train in {shard.parent}"
    assert damaged
    shard.unlink()
    with pytest.raises(DataError, match=f"1 of 2 files of imagenet2012 .* as {shard.name}"):
        imagenet.find(SPEC, root)


OPEN_FILES = """
import os, resource, sys
from input_pipeline import imagenet
from input_pipeline.specs import SPECS
from input_pipeline.streaming import EvalExamples

FILES = resource.RLIMIT_NOFILE
root, soft, hard = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
soft += len(os.listdir("/proc/self/fd"))
imagenet.OTHER_FILES = soft
resource.setrlimit(FILES, (soft, soft + hard))
source = imagenet.find(SPECS["imagenet"], root).train
print(sum(bool(source[i].data) for i in range(source.size)))
source = imagenet.find(SPECS["imagenet"], root).train
resource.setrlimit(FILES, (len(os.listdir("/proc/self/fd")) - 1,) * 2)
EvalExamples(source, side=8)(0)
"""


@pytest.mark.slow
def test_files_are_opened_beyond_the_usual_limit_if_the_system_allows_it(prepared_imagenet):
    root = prepared_imagenet(count=40, shards=20)
    read = lambda soft, hard: finish(start("-c", OPEN_FILES, root, soft, hard, cwd=ROOT))
    out, err, _ = read(soft=10, hard=40)
    assert out == "40\n", err
    # What the limit keeps from being read is not an unreadable image.
    assert re.search("DataError: record 0 of train in .*: .*Too many open files", err)
    _, err, _ = read(soft=10, hard=39)
    said = r"reading it takes up to \d+ open files, and this system allows \d+; have its hard limit"
    assert re.search(said, err.splitlines()[-1])


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGENET_PATH", str(write_tree(tmp_path / "a", train=3, test=3)))
    assert imagenet.find(SPEC).train.size == 3
    # What is asked for comes before what the environment says.
    assert imagenet.find(SPEC, write_tree(tmp_path / "b", train=5, test=3)).train.size == 5


def test_a_source_is_small_to_send(tmp_path):
    import cloudpickle

    source = imagenet.find(SPEC, write_tree(tmp_path, train=300, test=3)).train
    assert len(cloudpickle.dumps(source)) < 300 * 40 + 5000


def test_tfrecords_are_refused_with_the_command_that_converts_them(prepared_imagenet, monkeypatch):
    root = prepared_imagenet()
    (info,) = root.glob("imagenet2012/*/dataset_info.json")
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    command = (
        f"`tfds convert_format --dataset_version_dir={info.parent} --out_file_format=array_record`"
    )
    with pytest.raises(DataError, match="is there as tfrecord") as caught:
        imagenet.find(SPEC, root)
    assert command in str(caught.value)

    # What the command leaves: both formats in one folder, and the new one among the alternatives.
    text = info.read_text()
    info.write_text(text.replace("{", '{"alternativeFileFormats": ["array_record"],', 1))
    assert imagenet.find(SPEC, root).train.size == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "has neither imagenet2012, .* nor folders train and val"),
        (lambda root: (root / "imagenet2012").mkdir(), "no complete version"),
        (lambda root: [(root / s).mkdir() for s in ("train", "val")], "train has no folders of"),
        (
            lambda root: (write_tree(root, 3, 0), (root / "val").mkdir()),
            "val has no folders of images",
        ),
        (
            lambda root: write_tree(root, 1001, 1, [f"c{i:04d}" for i in range(1001)]),
            "1001 classes, more than the 1000",
        ),
    ],
)
def test_what_is_missing_is_said(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        imagenet.find(SPEC, tmp_path)


def test_classes_without_names_are_said(prepared_imagenet):
    (names,) = prepared_imagenet().glob("imagenet2012/*/label.labels.txt")
    root, lines = names.parent.parent.parent, names.read_text().splitlines()
    names.write_text("\n".join([lines[1], *lines[1:]]))
    with pytest.raises(DataError, match=f"{names.parent}: names 999 classes in .*, and not 1000"):
        imagenet.find(SPEC, root)
    names.write_text("\n".join(lines[:499]))
    with pytest.raises(DataError, match=f"{names.parent}: names 499 classes in .*, and not 1000"):
        imagenet.find(SPEC, root)
    names.unlink()
    with pytest.raises(DataError, match=f"{names.parent}: has no label.labels.txt with the names"):
        imagenet.find(SPEC, root)


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_a_description_that_cannot_be_understood_is_one_line(prepared_imagenet, file):
    root = prepared_imagenet()
    (path,) = root.glob(f"imagenet2012/*/{file}")
    for text in ("", '{"newField": 1, ' + path.read_text().lstrip("{")):
        path.write_text(text)
        with pytest.raises(DataError, match=r"^--data_dir .*: imagenet2012 is there, but can.*$"):
            imagenet.find(SPEC, root)


def test_a_split_that_is_missing_is_named(prepared_imagenet):
    with pytest.raises(DataError, match="no splits train and validation, only train"):
        imagenet.find(SPEC, prepared_imagenet(splits=("train",)))


def test_cloud_paths_reach_tfds_as_they_are(monkeypatch):
    import tensorflow_datasets as tfds
    from etils import epath

    asked = []

    def builder(name, data_dir, **kwargs):
        asked.append((name, os.fspath(data_dir)))
        raise DataError("asked")

    monkeypatch.setattr(tfds, "builder", builder)
    monkeypatch.setattr(epath.gpath._GPath, "glob", lambda path, pattern: [])
    monkeypatch.setattr(epath.gpath._GPath, "is_dir", lambda path: True)
    monkeypatch.setattr(cloud, "obstacle", lambda path: "")
    with pytest.raises(DataError, match="asked"):
        imagenet.find(SPEC, "gs://bucket/folder")
    assert asked == [("imagenet2012", "gs://bucket/folder")]
