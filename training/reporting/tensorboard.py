"""Writes epochs for TensorBoard, without a writer thread, as that hangs on a full disk."""

import os
import time
import types

from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import register_writer_factory

from training.records import EpochRecord
from training.workdir import RewrittenFile

# In a bucket, where tensorboardX would have a client of its own.
register_writer_factory("gs", types.SimpleNamespace(open=RewrittenFile))


class EventFile:
    """One ``events.out.tfevents.*`` file in the folder of a run."""

    def __init__(self, workdir: epath.Path, first_step: int):
        """Starts the file.

        Args:
          workdir: the folder of the run.
          first_step: the step from which TensorBoard is to ignore the other files in the folder.

        Raises:
          OSError: if it cannot be written.
        """
        # Files are named by the second, and another process may have started in the same one.
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
