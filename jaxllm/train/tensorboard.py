"""TensorBoard event files, written at once and in this thread.

tensorboardX's own SummaryWriter hands events to a thread; when that meets a full disk it dies, and the run waits for it
forever. Its record format and messages are used here without the thread, so that an error arrives where it can be told.
"""

import pathlib
import time

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar, text


class Board:
    """One event file of a run; `start` > 0: what an earlier one holds of later steps is void."""

    def __init__(self, folder: pathlib.Path, start: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.events = EventsWriter(str(folder / "events"))
        if start:
            self._write(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write(Event(step=step, summary=scalar(name, value)))
        self.events.flush()

    def text(self, step: int, name: str, content: str) -> None:
        self._write(Event(step=step, summary=text(name, content)))
        self.events.flush()

    def close(self) -> None:
        self.events.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self.events.write_event(event)
