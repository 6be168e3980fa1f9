#!/usr/bin/env python3
"""Trains a network with automatic gradient descent: reads the flags, runs, says what went wrong."""

import faulthandler
import logging
import os
import signal
import sys
import threading

from input_pipeline.command_line import complain, parse
from input_pipeline.errors import DataError
from training import signals
from training.config import TrainConfig
from training.errors import ConfigError, NonFiniteError, ReadError, SaveError
from training.signals import Stopped


def main() -> int:
    """Returns the exit code: 0, 1 if training failed, 2 if it was asked for in a wrong way.

    One that a signal ended has 128 and the signal's number, 143 for SIGTERM and 130 for Ctrl-C.
    """
    signals.end_at_once()
    # `kill -USR1 PID` prints where each of its threads is.
    faulthandler.register(signal.SIGUSR1)
    config = parse(TrainConfig, "train.py")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("input_pipeline").setLevel(logging.INFO)
    logging.getLogger("training").setLevel(logging.DEBUG if config.verbose else logging.INFO)
    # What Orbax logs of a failure, at length, is said in one line of our own.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("jax._src.xla_bridge").addFilter(_without_traceback)
    try:
        # Before JAX is imported, so that a wrong flag is answered at once.
        config.to_evaluate() if config.eval_only else config.resolved()
        from training import run

        if config.eval_only:
            run.evaluate(config)
        else:
            run.train(config)
    except (ConfigError, DataError) as error:
        complain(f"error: {error}")
        return 2
    except (NonFiniteError, ReadError, SaveError) as error:
        complain(f"stopped: {error}")
        return 1
    except RuntimeError as error:  # JAX's own is one.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        complain(
            "stopped: out of memory on a device; give a smaller --train_bs or --test_bs, or more "
            f"devices ({reason})"
        )
        return 1
    except Stopped as stopped:
        complain(f"stopped: {stopped}")
        code = 128 + stopped.signum
        if stopped.stalled:
            # Python would wait for threads that read.
            last = threading.Timer(signals.PATIENCE_SECONDS, os._exit, (code,))
            last.daemon = True
            last.start()
        return code
    return 0


def _without_traceback(record: logging.LogRecord) -> bool:
    """Says in one line that a plugin of JAX does not start, as on a machine without its device."""
    if record.exc_info:
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[1]}", ()
        record.exc_info = None
    return True


if __name__ == "__main__":
    sys.exit(main())
