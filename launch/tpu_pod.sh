#!/bin/sh
# Trains on a slice of a Google TPU pod, from a machine that has gcloud: launch/tpu_pod.sh
#
# Every host needs this repository in ~/agd-jax, and there `./run install tpu` and `./run install gcs`,
# which the gcloud command below runs on all of them, too. Their service account has to be allowed to
# write in the bucket. Edit the next four lines.
#
# The run is in the bucket: after a preemption the same command goes on there, on a new TPU as well.
# To stop it, which saves first: the gcloud command with --worker=0 --command="pkill -f '[t]rain.py'".
# Not tried on a TPU: written from the documentation of gcloud and JAX.
TPU=my-tpu
ZONE=us-central2-b
TRAIN="--arch resnet50 --dataset imagenet --data_dir gs://my-bucket/tfds --train_bs 1024 \
  --precision bf16 --workdir gs://my-bucket/runs/resnet50"

exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd ~/agd-jax && exec .venv/bin/python train.py --distribute $TRAIN $*"
