#!/bin/sh
# Measures on a GPU what RESULTS.md and experiments/ say of one, in ten minutes and with no network:
#
#   TFDS_DATA_DIR=DIR IMAGENET=DIR WHEELS=DIR sh benchmarks/on_a_gpu.sh OUT
#
# TFDS_DATA_DIR has the prepared CIFAR-10, IMAGENET some of ImageNet as for benchmarks/resnet50.py
# (left out if it is not named), and WHEELS what gather_wheels.sh put there, for a machine without
# them. The most telling part comes first; OUT has what each printed as soon as it is there, and
# what the parts before an end by force have measured. SMOKE=1 is a try of everything at a tiny
# size, on a CPU too.
set -u
[ $# = 1 ] || { echo "usage: sh benchmarks/on_a_gpu.sh OUT" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${WHEELS-}" ]; then
  site=$(mktemp -d)
  python3 -m pip install --quiet --no-index --no-deps --target "$site" "$WHEELS"/*.whl || exit
  export PYTHONPATH="$site:$PYTHONPATH"
fi
if [ -n "${SMOKE-}" ]; then
  budget=smoke
  epoch="--arch fcn --steps 3 --turns 1 --checked 2"
  resnet50="--batch_size 2 --image_size 32 --steps 1 --turns 1 --workers 1 --no-peer"
  train="--arch fcn --epochs 1"
else
  budget=gpu
  cores=$(python3 -c 'import os; print(os.cpu_count())')
  epoch="--arch resnet18 --precision bf16 --threads $cores --workers $cores --profile $out/profile"
  resnet50="--steps 60"
  train="--arch resnet18 --precision bf16 --epochs 60"
fi

# part NAME SECONDS COMMAND ...: runs a part for so many seconds at the most, and shows its end.
part() {
  name=$1 limit=$2
  shift 2
  [ -z "${SMOKE-}" ] || limit=600
  echo "== $(date +%T) $name"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  tail -n 15 "$out/$name.log"
  [ $code = 0 ] || failed="$failed $name ($code)"
}
failed=

{
  date
  nvidia-smi -L || echo "no NVIDIA GPU"
  python3 -m pip list 2>/dev/null | grep -iE '^(jax|jaxlib|flax|optax|grain|torch|timm) '
} >"$out/machine.txt" 2>&1
cat "$out/machine.txt"

# Two frameworks share the memory.
export XLA_PYTHON_CLIENT_MEM_FRACTION=.45
part epoch 170 python3 benchmarks/epoch.py $epoch
if [ -n "${IMAGENET-}" ]; then
  part resnet50 130 python3 benchmarks/resnet50.py --data_dir "$IMAGENET" $resnet50
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION=.9
part resnet18 130 python3 train.py $train --dataset cifar10 --workdir "$out/resnet18"
part rates 170 python3 -m experiments run rates --budget $budget --results "$out"
echo "== $(date +%T) failed:${failed:- none}"
[ -z "$failed" ]
