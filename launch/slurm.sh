#!/bin/sh
# Trains under SLURM, on one node or many: sbatch launch/slurm.sh
#
# On each node one process drives all GPUs; no MPI is needed. Edit the #SBATCH lines and TRAIN. This
# folder and the data have to be where all nodes see them.
#
# The run is in runs/slurm-JOBID. A job that is preempted or requeued, or whose time is nearly up,
# saves and goes on there by itself; scancel ends it. When SLURM requeues, it leaves KillWait (30 s
# unless the site says otherwise) for saving, and --save_every bounds what is lost beyond that.
#
# For one process for each GPU: --ntasks-per-node=8 --cpus-per-task=12, and --gpus-per-node as it is.
# With --gpus-per-task=1 a process sees one GPU, as number 0, and JAX asks for that of its own number.
#
# Tried: SLURM 22.05 of Debian 12, two nodes on one machine, CPU (tests/launch/test_slurm.py).
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=96
#SBATCH --time=24:00:00 --signal=TERM@120
#SBATCH --requeue --open-mode=append
TRAIN="--arch resnet50 --dataset imagenet --data_dir $HOME/imagenet --train_bs 1024 --precision bf16"

# SLURM runs a copy of this file; the repository is where it was submitted.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit
# When SLURM itself requeues or cancels the job, this shell is told, too.
trap 'told=yes' TERM
# srun does not inherit --cpus-per-task. When a process fails it is not to send SIGTERM to the others,
# or all would look as if they had been asked to end; they notice within a minute.
# shellcheck disable=SC2086 # The flags are several words.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" \
  train.py --distribute $TRAIN --workdir "runs/slurm-$SLURM_JOB_ID" "$@"
code=$?
# The time is nearly up, or SLURM warns of a preemption: the training was told alone, and has saved.
if [ "$code" = 143 ] && [ -z "${told-}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
