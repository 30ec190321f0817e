"""Log lines on standard error: text, or JSON with `CALMCLIP_LOG=json`.

A JSON line is one record: an object with ``time`` (ISO 8601, UTC, milliseconds), ``level``, ``logger`` and ``message``,
then the record's ``fields`` (those of the access log), then ``traceback`` if there is an exception. A text line has the
same, with fields as ``name=value``; only a traceback takes more lines.
"""

import json
import logging
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

log = logging.getLogger("calmclip")

IN_MESSAGE = ("method", "path", "status")  # fields of the access log that its message has too


def log_lines(kind: str) -> logging.Handler:
    """A handler for standard error. ``kind``: as `Settings.log`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if kind == "json" else TextLines())
    return handler


def log_process(kind: str) -> None:
    """Let the whole process log lines of this ``kind``: every logger, warnings, and exceptions that nothing handles."""
    logging.basicConfig(level=logging.INFO, handlers=[log_lines(kind)], force=True)
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: log.critical("the process ends", exc_info=(kind, error, trace))
    threading.excepthook = _thread_ended
    sys.unraisablehook = _unraisable


class TextLines(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return _time(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        fields = {name: value for name, value in _fields(record).items() if name not in IN_MESSAGE}
        words = [f" {name}={value}" for name, value in fields.items() if value and not isinstance(value, dict)]
        return super().formatMessage(record) + "".join(words)


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str).decode()
        except TypeError:  # half a surrogate pair, as in the name of a file that is not UTF-8
            return json.dumps(line, default=str)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _thread_ended(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and args.exc_type is not SystemExit:
        name = args.thread.name if args.thread else "?"
        log.error("thread %s ended", name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback))


def _unraisable(args: "UnraisableHookArgs") -> None:
    """An exception in a finalizer, or in a callback of native code."""
    message = args.err_msg or "an exception was ignored in"
    log.error("%s: %r", message, args.object, exc_info=args.exc_value)
