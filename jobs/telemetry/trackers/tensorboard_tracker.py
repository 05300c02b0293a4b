"""TensorBoard: event files beside the stages. The only file that imports tensorboardX."""

import io
import json
import os
import time
from collections.abc import Mapping
from typing import Any

from PIL import Image

from jobs.telemetry import output
from jobs.telemetry.trackers.background import BackgroundTracker, Record, numbers
from jobs.telemetry.trackers.subject import State, Subject, read_image

_COMPLETE = "complete.json"
"""Exists while the event files have every step of all earlier sessions."""


class TensorboardTracker(BackgroundTracker):
    """Event files in the folder `tensorboard/` of a run or of a version of a dataset.

    Each session writes its own file. The file begins with an event that tells readers to discard the steps from
    `first_step` on. After a session that was killed, the next one reports all steps again.
    """

    name = "tensorboard"

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.folder = subject.own_folder("tensorboard")
        self.is_complete = (self.folder / _COMPLETE).exists() or not subject.training
        self._step = subject.first_step

    def open(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _COMPLETE).unlink(missing_ok=True)
        # Two sessions may begin in the same second.
        self._writer = EventsWriter(str(self.folder / "events"), f".{os.getpid()}-{time.time_ns() % 10**9:09d}")
        self._discard(self.subject.first_step if self.is_complete else 0)
        self._text("state", "running" if self.subject.first_step <= 1 else
                   f"resumed at step {self.subject.first_step}")
        self._text("settings", _indented(output.escape_document(self.subject.settings)))
        self._text("inputs", _indented(output.escape_document(self.subject.inputs)))

    def report(self, records: list[Record]) -> None:
        from tensorboardX import summary
        for record, images in records:
            self._step = record["step"]
            if self.is_complete and self._step < self.subject.first_step:
                continue
            for name, value in numbers(output.escape_document(record)).items():
                self._write(summary=summary.scalar(name, value))
            for name, url in images.items():
                if image := read_image(url):
                    self._write(summary=_image_summary(name, image))

    def flush(self) -> None:
        self._writer.flush()

    def finish(self, summary: dict[str, Any], state: State, *, complete: bool) -> None:
        if summary:
            self._text("summary", _indented(output.escape_document(summary)))
        self._text("state", state)
        self._writer.close()
        if complete:
            (self.folder / _COMPLETE).write_text(json.dumps({"step": self._step}))

    def _discard(self, step: int) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog
        self._write(session_log=SessionLog(status=SessionLog.START), step=step)

    def _text(self, name: str, text: str) -> None:
        from tensorboardX import summary
        self._write(summary=summary.text(name, text))

    def _write(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event
        self._writer.write_event(Event(**({"wall_time": time.time(), "step": self._step} | fields)))


def _image_summary(name: str, image: Image.Image) -> Any:
    from tensorboardX.summary import Summary
    data = io.BytesIO()
    image.save(data, "PNG")
    encoded = Summary.Image(height=image.height, width=image.width, colorspace=3, encoded_image_string=data.getvalue())
    return Summary(value=[Summary.Value(tag=name, image=encoded)])


def _indented(document: Mapping[str, Any]) -> str:
    """A document as a code block of Markdown, which is how TensorBoard shows texts."""
    return "\n".join(f"    {line}" for line in json.dumps(document, indent=1, default=str).splitlines())
