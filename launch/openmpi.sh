#!/bin/sh
# Trains under Open MPI 4, with a process for each slot: launch/openmpi.sh
#
# Edit the next three lines. Tried: Open MPI 4.1.4 of Debian 12, two processes on one machine, CPU.
HOSTS=localhost:2 # host:slots,host:slots
MPI_FLAGS=${MPI_FLAGS:-} # such as --mca btl_tcp_if_include eth0, or --allow-run-as-root
TRAIN="--arch fcn --dataset digits"

cd "$(dirname "$0")/.." || exit
# shellcheck disable=SC2086 # The flags are several words.
exec mpirun --host $HOSTS --bind-to none -x XLA_FLAGS $MPI_FLAGS \
  "${PYTHON:-.venv/bin/python}" train.py --distribute $TRAIN "$@"
