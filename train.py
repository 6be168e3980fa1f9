#!/usr/bin/env python3
"""Trains a network with automatic gradient descent: reads the flags, runs, says what went wrong."""

import logging
import sys

import tyro

from input_pipeline.errors import DataError
from training.config import ConfigError, TrainConfig


def main() -> int:
    """Returns the exit code: 0, 1 if training failed, 2 if it was asked for in a wrong way."""
    config = tyro.cli(TrainConfig, use_underscores=True)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("input_pipeline").setLevel(logging.INFO)
    try:
        config.resolved()  # Before JAX is imported, so that a wrong flag is answered at once.
        from training.loop import NonFiniteLossError, train

        try:
            train(config)
        except NonFiniteLossError as error:
            print(f"stopped: {error}", file=sys.stderr)
            return 1
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
