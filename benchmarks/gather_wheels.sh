#!/bin/sh
# Downloads the wheels that a GPU machine without network lacks, for on_a_gpu.sh there:
#
#   sh benchmarks/gather_wheels.sh FOLDER
#
# They are for Linux on x86-64 and the Python named by PYTHON (3.12), in the versions of
# requirements.lock, 15 MB in all. The machine itself needs JAX for its GPU, PyTorch, timm, numpy,
# matplotlib, pandas, pillow, opencv, safetensors, scikit-learn and rich.
set -eu
[ $# = 1 ] || { echo "usage: sh benchmarks/gather_wheels.sh FOLDER" >&2; exit 2; }
folder=$1
lock=$(dirname "$0")/../requirements.lock

# Prints name==version. Of several lines of the lock, that for the newest Python comes last.
locked() {
  sed -n "s/^\($1==[^ ]*\).*/\1/p" "$lock" | tail -n 1
}

set -- --platform manylinux2014_x86_64
for glibc in 17 24 27 28; do set -- "$@" --platform "manylinux_2_${glibc}_x86_64"; done
# Without what they need, as that is there or named here too.
for name in absl-py array-record dm-tree docstring-parser etils filelock flax \
  googleapis-common-protos grain humanize immutabledict importlib-resources msgpack optax \
  orbax-checkpoint portpicker protobuf simple-parsing simplejpeg tabulate tensorboardx \
  tensorflow-datasets tensorflow-metadata termcolor toml tqdm treescope typeguard tyro; do
  set -- "$@" "$(locked "$name")"
done
pip="python3 -m pip --quiet --disable-pip-version-check"
$pip download --dest "$folder" --no-deps --only-binary=:all: --implementation cp \
  --python-version "${PYTHON:-3.12}" "$@"
# There is no wheel of this one to download; it is built from its source, and fits any Python.
$pip wheel --wheel-dir "$folder" --no-deps "$(locked promise)"
du -sh "$folder"
