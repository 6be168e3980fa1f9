#!/usr/bin/env python3
"""Trains a network with automatic gradient descent: reads the flags, runs, says what went wrong."""

import logging
import sys

from input_pipeline.command_line import parse
from input_pipeline.errors import DataError
from training import stopping
from training.config import ConfigError, TrainConfig
from training.workdir import SaveError


def main() -> int:
    """Returns the exit code: 0, 1 if training failed, 2 if it was asked for in a wrong way.

    One that a signal ended has 128 and the signal's number, 143 for SIGTERM and 130 for Ctrl-C.
    """
    stopping.end_at_once()
    config = parse(TrainConfig, "train.py")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("input_pipeline").setLevel(logging.INFO)
    # What Orbax logs of a failure, at length, is said in one line of our own.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        return evaluate(config) if config.eval_only else train(config)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def train(config: TrainConfig) -> int:
    """Trains, and says what ended it if that was not the last epoch."""
    config.resolved()  # Before JAX is imported, so that a wrong flag is answered at once.
    from training import loop
    from training.epochs import NonFiniteError

    try:
        loop.train(config)
    except (NonFiniteError, SaveError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except stopping.Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return 128 + stopped.signum
    return 0


def evaluate(config: TrainConfig) -> int:
    """Tests what a run has left, and prints it."""
    config.to_test()  # As above.
    from training import console, evaluation, processes

    tested = evaluation.evaluate(config)
    if processes.first():
        console.print_tested(tested)
    return 0


if __name__ == "__main__":
    sys.exit(main())
