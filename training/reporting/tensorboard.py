"""The epochs of a run for TensorBoard. A writer with a thread of its own hangs on a full disk."""

import os
import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from training.records import EpochRecord


class EventFile:
    """One ``events.out.tfevents.*`` in a workdir."""

    def __init__(self, workdir: Path, first_step: int):
        """Begins the file.

        Args:
          workdir: of the run.
          first_step: what other files of the workdir have from there on is to be forgotten.

        Raises:
          OSError: if it cannot be written.
        """
        # Another process may have begun within the same second, after which files are named.
        self._writer = EventsWriter(os.fspath(workdir / "events"), f".{os.getpid()}")
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))
        self._writer.flush()

    def write(self, record: EpochRecord) -> None:
        """Adds the numbers of an epoch's record, at its step.

        Raises:
          OSError: if it cannot be written.
        """
        values = [
            Summary.Value(tag=name, simple_value=value) for name, value in record.to_json().items()
        ]
        event = Event(wall_time=time.time(), step=record.step, summary=Summary(value=values))
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
