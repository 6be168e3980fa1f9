#!/bin/sh
# Trains under SLURM, on one node or many: sbatch launch/slurm.sh
#
# srun starts one process for each GPU and tells it who it is; no MPI is needed. Edit the next three
# lines. Tried: with the environment that SLURM sets, by tests/launch/test_launch.py; not on a cluster.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8 --gpus-per-task=1 --cpus-per-task=12
TRAIN="--arch resnet50 --dataset imagenet --data_dir $HOME/imagenet --train_bs 1024 --precision bf16"

# SLURM runs a copy of this file; the repository is where it was submitted.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit
# shellcheck disable=SC2086 # The flags are several words.
exec srun --kill-on-bad-exit=1 .venv/bin/python train.py --distribute $TRAIN "$@"
