#!/bin/sh
# Trains on a slice of a Google TPU pod, from a machine that has gcloud: launch/tpu_pod.sh
#
# Every host needs this repository in ~/agd-jax with `pip install -e '.[train]' 'jax[tpu]'` in .venv.
# Edit the next three lines. Not tried yet: written from the documentation of gcloud and JAX.
TPU=my-tpu
ZONE=us-central2-b
TRAIN="--arch resnet50 --dataset imagenet --data_dir gs://my-bucket/tfds --train_bs 1024 --precision bf16"

exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all \
  --command "cd ~/agd-jax && .venv/bin/python train.py --distribute $TRAIN $*"
