#!/bin/sh
# Trains under Open MPI 4, with a process for each slot: launch/openmpi.sh
#
# Edit the next three lines. One slot for each host is the simplest: its process drives all GPUs;
# several on a host drive one each. Start it on the first host; this folder and the data have to be
# where all hosts see them. The same command goes on where it stopped.
# Tried: Open MPI 4.1.4 of Debian 12, two processes on one machine, CPU.
HOSTS=localhost:2 # host:slots,host:slots
MPI_FLAGS=${MPI_FLAGS:-} # such as --mca btl_tcp_if_include eth0, or --allow-run-as-root
TRAIN="--arch fcn --dataset digits --workdir runs/openmpi"

cd "$(dirname "$0")/.." || exit
# mpirun passes SIGTERM on after the timeout, and kills after it once more: the default of a second
# is too short to save in.
# shellcheck disable=SC2086 # The flags are several words.
exec mpirun --host $HOSTS --bind-to none --mca odls_base_sigkill_timeout 20 \
  ${XLA_FLAGS+-x XLA_FLAGS} $MPI_FLAGS "${PYTHON:-.venv/bin/python}" train.py --distribute $TRAIN "$@"
