"""Runs whose workdir and data are in a bucket, that of an emulator on this machine."""

import importlib.util
import json
import os
import re
import socket
import time
import types
import urllib.parse
import urllib.request

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from tests.helpers import ROOT, finish, free_address, read_records, start
from tests.images import write_tree
from training.checkpoints import load, reading
from training.config import TrainConfig
from training.errors import ConfigError

FLAGS = "--platform cpu --epochs 4 --depth 3 --width 48 --save_every 5steps"
TIMINGS = ("seconds", "images_per_second")

# What TensorStore and gcsfs need of Google's store and the emulator lacks: the generation of what
# is read, without which TensorStore fails to write it again ("Malformed StorageGeneration");
# renaming, of which there are only the two halves; answers to others while one client, which has
# connected, asks nothing; and room for all who ask at once, or they are refused and wait.
EMULATOR = r"""
import http.server, os, sys, threading
from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

def move(request, response, storage):
    bucket = request.params["dest_bucket_name"] = request.params["bucket_name"]
    objects.copy(request, response, storage)
    if response.status < 300:
        storage.delete_file(bucket, request.params["object_id"])

read = objects.download

def download(request, response, storage, *args, **kwargs):
    read(request, response, storage, *args, **kwargs)
    if response.status < 300:
        where = request.params["bucket_name"], request.params["object_id"]
        response["x-goog-generation"] = storage.get_file_obj(*where)["generation"]

objects.download = download
path = r"/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.+)/moveTo/o/(?P<dest_object_id>.+)"
server.HANDLERS = ((path, {server.POST: move}), *server.HANDLERS)

lock, handle = threading.Lock(), server.Router.handle

def in_turn(router, method):
    with lock:
        handle(router, method)

server.Router.handle = in_turn
http.server.HTTPServer = http.server.ThreadingHTTPServer
http.server.ThreadingHTTPServer.request_queue_size = 128
sys.stderr = open(os.devnull, "w")  # It writes a line for each request, which nobody reads.
server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
"""


class Bucket:
    """The one bucket of the emulator.

    Attributes:
      process: the emulator.
      env: the environment in which programs use it.
    """

    def __init__(self, process, address):
        self.process, self._url = process, f"http://{address}"
        self.env = os.environ | {
            # For gcsfs, TensorStore and ArrayRecord.
            "STORAGE_EMULATOR_HOST": self._url,
            "TENSORSTORE_GCS_HTTP_URL": self._url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self._url,
            # Else gcsfs asks, without credentials, what kind of bucket it is.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def request(self, path, data=None):
        with urllib.request.urlopen(f"{self._url}{path}", data) as response:
            return response.read()

    def names(self, prefix):
        """The names of the objects in a folder, without its own."""
        listed = json.loads(self.request(f"/storage/v1/b/bucket/o?prefix={prefix}/"))
        return [item["name"].removeprefix(f"{prefix}/") for item in listed.get("items", ())]

    def read(self, name):
        return self.request(f"/bucket/{name}")

    def upload(self, folder, name):
        """Copies a folder of this machine's."""
        for file in folder.rglob("*"):
            if file.is_file():
                quoted = urllib.parse.quote(f"{name}/{file.relative_to(folder)}", safe="")
                path = f"/upload/storage/v1/b/bucket/o?uploadType=media&name={quoted}"
                self.request(path, file.read_bytes())

    def records(self, run):
        return [json.loads(line) for line in self.read(f"{run}/metrics.jsonl").splitlines()]

    def wait_for_epochs(self, run, epochs):
        deadline = time.monotonic() + 300
        while "metrics.jsonl" not in self.names(run) or len(self.records(run)) < epochs:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def train(self, *flags, devices=1):
        env = self.env | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        return start(ROOT / "train.py", *FLAGS.split(), *flags, env=env)

    def export(self, run, file):
        """The tensors of its last checkpoint."""
        command = ("-m", "training.export", run, file, "--which", "last")
        _, err, code = finish(start(*command, env=self.env, cwd=ROOT))
        assert code == 0, err
        return safetensors.numpy.load_file(file)


@pytest.fixture
def bucket():
    for module in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(module, reason=f"needs {module}, of the extras gcs and dev")
    address = free_address()
    host, _, port = address.partition(":")
    process = start("-c", EMULATOR, port)
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection((host, int(port))).close()
            return Bucket(process, address)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def untimed(records):
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]


def same_arrays(ours, theirs):
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
def test_a_run_in_a_bucket_that_is_killed_ends_as_one_on_a_disk_that_is_not(bucket, tmp_path):
    _, err, code = finish(bucket.train("--workdir", tmp_path / "whole"))
    assert code == 0, err

    run = ("--workdir", "gs://bucket/a/run")
    for epochs in (1, 2):
        process = bucket.train(*run)
        bucket.wait_for_epochs("a/run", epochs)
        process.kill()
        finish(process)
    out, err, code = finish(bucket.train(*run))
    assert code == 0, err
    assert "resumed   after step " in out
    assert (
        "(best), 44 (last), in gs://bucket/a/run/checkpoints" in out or "44 (best and last)" in out
    )

    whole, ours = tmp_path / "whole", bucket.records("a/run")
    assert untimed(ours) == untimed(read_records(whole))
    exported = bucket.export("gs://bucket/a/run", tmp_path / "a.safetensors")
    assert same_arrays(exported, bucket.export(whole, tmp_path / "b.safetensors"))
    assert json.loads(bucket.read("a/run/config.json"))["workdir"] == "gs://bucket/a/run"
    assert bucket.read("a/run/curves.png").startswith(b"\x89PNG")
    # What is deleted of a checkpoint is deleted whole.
    names = bucket.names("a/run")
    checkpoints = {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
    assert {name.split("/")[0] for name in names} - {"checkpoints"} == {
        "config.json",
        "metrics.jsonl",
        "curves.png",
        *(name for name in names if name.startswith("events.out.tfevents.")),
    }
    for step in checkpoints:
        assert f"checkpoints/{step}/commit_success.txt" in names
    assert {"35", "40", "44"} <= checkpoints
    assert len(checkpoints) <= 4

    out, err, code = finish(bucket.train("--eval_only", *run))
    assert code == 0, err
    last = ours[-1]
    assert re.search(rf"last +44 +4 +{last['test_loss']:.4f} +{last['test_accuracy']:.2%}", out)


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
def test_beginning_afresh_in_a_bucket_sets_the_earlier_run_aside(bucket):
    run = ("--workdir", "gs://bucket/run", "--epochs", 1)
    for seed in range(2):
        out, err, code = finish(bucket.train(*run, "--seed", seed, "--restart"))
        assert code == 0, err
    (aside,) = re.findall(
        r"^set aside the earlier run, in gs://bucket/(run/earlier-\S+)$", out, re.M
    )
    assert json.loads(bucket.read(f"{aside}/config.json"))["seed"] == 0
    assert json.loads(bucket.read("run/config.json"))["seed"] == 1
    assert len(bucket.records(aside)) == len(bucket.records("run")) == 1
    evaluated = [
        finish(bucket.train("--workdir", f"gs://bucket/{name}", "--eval_only"))
        for name in (aside, "run")
    ]
    for (out, err, code), name in zip(evaluated, (aside, "run"), strict=True):
        assert code == 0, err
        assert f"{bucket.records(name)[-1]['test_loss']:.4f}" in out


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
def test_several_processes_share_a_workdir_in_a_bucket(bucket):
    """They train and save together, and one goes on with what two have written."""
    run = ("--workdir", "gs://bucket/run", "--mesh", "fsdp=2", "--save_every", "20steps")
    run += ("--epochs", 2)
    meet = ("--coordinator", free_address(), "--num_processes", 2, "--process_id")
    for _, err, code in map(finish, [bucket.train(*run, *meet, i) for i in range(2)]):
        assert code == 0, err
    out, err, code = finish(bucket.train(*run, "--epochs", 3, devices=2))
    assert code == 0, err
    assert "resumed   after step 22, with 2 epochs done" in out
    assert len(bucket.records("run")) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_tree_of_images_in_a_bucket_is_read_as_one_on_a_disk(bucket, tmp_path, workers):
    tree = write_tree(tmp_path / "imagenet", train=50, test=11)
    bucket.upload(tree, "imagenet")
    flags = "--dataset imagenet --image_size 16 --train_bs 24 --test_bs 24 --epochs 2"
    for data in (tree, "gs://bucket/imagenet"):
        run = ("--workdir", tmp_path / f"{'://' in str(data)}", "--workers", workers)
        _, err, code = finish(bucket.train(*flags.split(), *run, "--data_dir", data))
        assert code == 0, err
    assert untimed(read_records(tmp_path / "True")) == untimed(read_records(tmp_path / "False"))


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
def test_a_prepared_data_set_in_a_bucket_is_read_as_one_on_a_disk(bucket, tmp_path, prepared):
    folder = prepared("mnist")
    bucket.upload(folder, "tfds")
    for data in (folder, "gs://bucket/tfds"):
        run = ("--workdir", tmp_path / f"{'://' in str(data)}", "--train_bs", 32, "--epochs", 2)
        _, err, code = finish(bucket.train("--dataset", "mnist", *run, "--data_dir", data))
        assert code == 0, err
    assert untimed(read_records(tmp_path / "True")) == untimed(read_records(tmp_path / "False"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--workdir gs://absent/run", "--workdir gs://absent/run: no such bucket, or object in it"),
        ("--eval_only --workdir gs://bucket/absent", "gs://bucket/absent: holds no checkpoint"),
        (
            "--dataset mnist --data_dir gs://absent/tfds",
            "--data_dir gs://absent/tfds: no such bucket, or object in it",
        ),
        (
            "--dataset imagenet --data_dir gs://bucket/absent",
            "--data_dir gs://bucket/absent: has neither imagenet2012, .*",
        ),
    ],
)
def test_what_is_not_there_is_said_in_one_line(bucket, flags, message):
    _, err, code = finish(bucket.train(*flags.split()))
    assert code == 2
    assert re.search(f"^error: {message}$", err, re.M), err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["s3://bucket/run", "gs://", "gs:///run"])
def test_what_names_no_bucket_is_refused(name):
    with pytest.raises(ConfigError, match=rf"^--workdir {name}: is no folder, and not in a bucket"):
        TrainConfig(workdir=name).resolved()


def test_a_bucket_needs_the_extra_gcs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = "gs://bucket/run: a bucket needs the extra gcs: "
    for use in (TrainConfig.resolved, TrainConfig.to_evaluate):
        with pytest.raises(ConfigError, match=f"^--workdir {message}"):
            use(TrainConfig(workdir="gs://bucket/run"))
    with pytest.raises(ConfigError, match=f"^{message}"):
        load("gs://bucket/run")


def test_what_cannot_be_read_of_a_bucket_is_no_damage(monkeypatch):
    """Else intact checkpoints would be renamed, and the run would go on from older ones."""
    refused = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})
    reader = types.SimpleNamespace(all_steps=lambda: [5, 10], directory=epath.Path("gs://bucket/a"))

    def read(step):
        raise refused("Forbidden, 403")

    monkeypatch.setattr(reading, "RETRY_SECONDS", ())
    with pytest.raises(ConfigError, match=r"^gs://bucket/a/10: Forbidden, 403$"):
        reading.newest_readable(reader, read)
