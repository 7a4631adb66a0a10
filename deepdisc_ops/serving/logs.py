"""The logs of a run directory: in order of time over all files, of one request, and what they say of a failed start.

``logs/supervisor.log`` is the supervisor's, ``logs/N/`` holds those of the N-th server: ts_log and access_log (the JVM),
model_log (the workers) and console. Older parts lie beside them, compressed.
"""

from __future__ import annotations

import gzip
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = "logs"
KEPT_GENERATIONS = 5

_EXCEPTION_LINE = re.compile(r"(?:^|MODEL_LOG - )((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt)\b(?::.*)?)$")
_TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[,.]\d{3}")
_PREDICTED = re.compile(r" W-(\d+)-\S+ ACCESS_LOG - .* /predictions/\S* HTTP/[\d.]+\" 200 ")
_REQUEST = re.compile(r"\brequest (\S+) (\S+) \d{3}\b")


@dataclass(frozen=True)
class Entry:
    """A line of a log with the lines that belong to it (a traceback); ``time`` as it is written there."""

    time: str
    file: str
    text: str


def folder_of(run_dir: Path, generation: int) -> Path:
    """Where the logs of one server are."""
    return run_dir / FOLDER / str(generation)


def generations(run_dir: Path) -> list[int]:
    """Numbers of the servers that left logs, ascending."""
    folder = run_dir / FOLDER
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def entries(run_dir: Path) -> list[Entry]:
    """All that is in the logs, by time; lines of one moment in the order of their files."""
    found = [entry for path in _files(run_dir) for entry in _parse(path.name, _read(path))]
    return sorted(found, key=lambda entry: entry.time)


def of_request(found: Sequence[Entry], request: str) -> list[Entry]:
    """The entries that name a request by the client's id or TorchServe's; the worker's line on it joins the two."""
    names = {request}
    for entry in found:
        if (match := _REQUEST.search(entry.text)) and request in match.groups():
            names |= set(match.groups())
    pattern = re.compile("|".join(rf"(?<![\w.-]){re.escape(name)}(?![\w-])" for name in names))
    return [entry for entry in found if pattern.search(entry.text)]


def follow(run_dir: Path, *, pause: Callable[[float], None] = time.sleep) -> Iterator[Entry]:
    """New entries for ever, those of servers started later too."""
    places = {path: path.stat().st_size for path in _files(run_dir)}
    while True:
        for path in _files(run_dir):
            if path.suffix == ".gz":
                continue
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                start = places.get(path, 0) if size >= places.get(path, 0) else 0  # the file was rotated
                file.seek(start)
                whole = file.read(size - start)
            whole = whole[: whole.rfind(b"\n") + 1]
            places[path] = start + len(whole)
            yield from _parse(path.name, whole.decode(errors="replace"))
        pause(0.5)


def answered(access_log: Path) -> set[str]:
    """Numbers of the workers that have predicted, by the access log, whose lines are written by a worker's own thread."""
    return set(_PREDICTED.findall("\n".join(tail(access_log))))


def failure_in_log(text: str) -> str | None:
    """Why the model could not be loaded, from the logs of server and worker: the last exception in them.

    TorchServe's worker ends with an exception of its own (``RuntimeError: 500 - ...``), which says nothing.
    """
    if "Backend worker process died" not in text and "Failed to load model" not in text:
        return None
    reasons = [match[1] for line in text.splitlines() if (match := _EXCEPTION_LINE.search(line.rstrip()))]
    telling = [reason for reason in reasons if not re.match(r"RuntimeError: \d{3} - ", reason)]
    return telling[-1].removeprefix("deepdisc_ops.errors.") if telling else None


def tail(path: Path, lines: int = 400) -> list[str]:
    """The last lines of a log, none where it is missing."""
    try:
        return path.read_text(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def summary(lines: Sequence[str]) -> str:
    """The line that says most: the last one that names an exception, or the last one."""
    telling = [line for line in lines if _EXCEPTION_LINE.search(line)] or [line for line in lines if line.strip()]
    return telling[-1].strip() if telling else "its log is empty"


def _files(run_dir: Path) -> list[Path]:
    """Older parts before younger ones: x.2.log.gz, x.1.log.gz (log4j counts up), then x.log."""
    folder = run_dir / FOLDER
    return sorted((*folder.glob("**/*.log"), *folder.glob("**/*.log.gz"), *folder.glob("*.log.[0-9]")))


def _read(path: Path) -> str:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", errors="replace") as file:
            return file.read()
    return path.read_text(errors="replace")


def _parse(file: str, text: str) -> Iterator[Entry]:
    """Entries of one file; what stands before its first time has none and comes first."""
    moment, lines = "", list[str]()
    for line in text.splitlines():
        if match := _TIME.match(line):
            if lines:
                yield Entry(moment, file, "\n".join(lines))
            moment, lines = match[0].replace(" ", "T").replace(".", ","), [line]
        else:
            lines.append(line)
    if lines:
        yield Entry(moment, file, "\n".join(lines))
