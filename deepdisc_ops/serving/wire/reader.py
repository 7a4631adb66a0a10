"""A process of its own that reads what strangers send in FITS and HDF5, so that no file can take a worker down with it.

The libraries of these formats are large and partly C: a few damaged bytes end the process that reads them (one in some hundreds of
flipped HDF5 files ends in SIGSEGV), or make it ask for any amount of memory. The reader has limits of its own, is ended when it
takes too long, and is started again for the next request. Descriptors go in, arrays come out, through unnamed files in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepdisc_ops.errors import ImageError, ServerError
from deepdisc_ops.serving.wire.fault import Refused
from deepdisc_ops.serving.wire.files import CODES, REMEDIES, Job, Pixels, read
from deepdisc_ops.serving.wire.protocol import MAX_BANDS, MAX_BOXES

TIMEOUT_S = 60.0
START_TIMEOUT_S = 120.0
MESSAGE_BYTES = 1 << 17
MAX_WCS = 1 << 26
READY = b"ready"
SPARE_BYTES = 1 << 29
"""Address space beyond that of the arrays."""


class Reader:
    """Reads in another process, which is started when it is first needed; for one thread. Close it, or use it as a context.

    ``memory_bytes`` is the address space that the process may take beyond what it has at its start.
    """

    def __init__(self, memory_bytes: int, timeout_s: float = TIMEOUT_S) -> None:
        self._memory_bytes, self._timeout_s = memory_bytes, timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def read(self, job: Job, descriptors: Sequence[int]) -> Pixels:
        """What ``job`` says of open files, which stay open. Raises `Refused`, `ImageError`; `ServerError` without a process."""
        process, connection = self._running()
        try:
            socket.send_fds(connection, [json.dumps(job.as_dict()).encode()], list(descriptors))
            message, received = _receive(connection, 1)
        except TimeoutError:
            self.close()
            raise Refused(CODES[job.kind], f"reading it took over {self._timeout_s:.0f} s", REMEDIES[job.kind]) from None
        except OSError:
            message, received = b"", []
        if not message:
            self.close()
            raise Refused(CODES[job.kind], f"reading it {_ending(process)}", REMEDIES[job.kind])
        try:
            return _pixels(json.loads(message), received, job)
        finally:
            for descriptor in received:
                os.close(descriptor)

    @property
    def pid(self) -> int | None:
        """Of the process, where there is one."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End the process."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()
        self._process = self._socket = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _running(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        if self._process is not None and self._socket is not None and self._process.poll() is None:
            return self._process, self._socket
        self.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                reader_command(theirs.fileno(), self._memory_bytes),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the worker's output is TorchServe's log, and its metrics
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HDF5_USE_FILE_LOCKING": "FALSE"},
            )
        self._socket = ours
        ours.settimeout(START_TIMEOUT_S)
        try:
            ready = ours.recv(len(READY))
        except OSError:
            ready = b""
        if ready != READY:
            process = self._process
            self.close()
            raise ServerError(f"the process that reads FITS and HDF5 did not start: it {_ending(process)}; run {process.args!r}")
        ours.settimeout(self._timeout_s)
        return self._process, ours


def reader_command(descriptor: int, memory_bytes: int) -> list[str]:
    """The command of the process; modules of the working directory are none of its."""
    return [sys.executable, "-P", "-m", "deepdisc_ops.serving.wire.reader", str(descriptor), str(memory_bytes)]


def _ending(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(5)
    except subprocess.TimeoutExpired:
        return "did not answer"
    return f"ended the reader by {signal.Signals(-code).name}" if code < 0 else f"ended the reader with {code}"


def _receive(connection: socket.socket, most: int) -> tuple[bytes, list[int]]:
    """One message and its descriptors, which programs started later do not inherit."""
    message, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, most, socket.MSG_CMSG_CLOEXEC)
    return message, list(descriptors)


def _pixels(tree: dict[str, Any], received: Sequence[int], job: Job) -> Pixels:
    """The arrays of an answer; its process may have been taken over, so its word counts for nothing."""
    if "code" in tree:
        if tree["code"] == "unusable":
            raise ImageError(str(tree["what"]))
        raise Refused(str(tree["code"]), str(tree["what"]), str(tree["remedy"]))
    count, height, width = (int(side) for side in tree["shape"])
    boxes, wcs, bands = tree["boxes"], int(tree["wcs"]), tuple(str(band) for band in tree["bands"])
    sane = 1 <= count == len(bands) <= MAX_BANDS and 1 <= max(height, width) <= job.max_window and min(height, width) >= 1
    if not sane or not 0 <= (boxes or 0) <= MAX_BOXES or not 0 <= wcs <= MAX_WCS:
        raise Refused(CODES[job.kind], "reading it gave no image", REMEDIES[job.kind])
    data = np.empty((count, height, width), np.float32)
    mask = np.empty((height, width), np.bool_)
    given = None if boxes is None else np.empty((int(boxes), 4), np.float32)
    header = np.empty(wcs, np.uint8)
    _load([data, mask, *([] if given is None else [given]), header], received[0], job)
    return Pixels(data, bands, mask, given, header.tobytes())


def _load(arrays: Sequence[NDArray[Any]], descriptor: int, job: Job) -> None:
    """Fill arrays from a file, one behind the other."""
    offset = 0
    for one in arrays:
        view = memoryview(one.view(np.uint8).reshape(-1).data) if one.size else memoryview(b"")
        while view:
            taken = os.preadv(descriptor, [view], offset)
            if not taken:
                raise Refused(CODES[job.kind], "reading it gave too few pixels", REMEDIES[job.kind])
            view, offset = view[taken:], offset + taken


def _answer(message: bytes, descriptors: Sequence[int]) -> tuple[dict[str, Any], int | None]:
    """What the process answers to a message: a description with a file of arrays, or a fault."""
    job = Job.from_dict(json.loads(message))
    try:
        found = read(job, descriptors)
        tree: dict[str, Any] = {
            "shape": found.data.shape,
            "bands": found.bands,
            "boxes": None if found.boxes is None else len(found.boxes),
            "wcs": len(found.wcs),
        }
        return tree, _stored(found)
    except Refused as refusal:
        return {"code": refusal.fault.code, "what": refusal.fault.what[:1000], "remedy": refusal.fault.remedy}, None
    except ImageError as error:
        return {"code": "unusable", "what": str(error)[:1000], "remedy": ""}, None
    except MemoryError:
        what, remedy = "reading it needs more memory than a window of the server may", "send smaller windows"
        return {"code": CODES[job.kind], "what": what, "remedy": remedy}, None
    except Exception as error:  # noqa: BLE001 - whatever a library makes of hostile bytes
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return {"code": CODES[job.kind], "what": f"it cannot be read ({what})", "remedy": REMEDIES[job.kind]}, None


def _stored(found: Pixels) -> int:
    descriptor = os.memfd_create("pixels", os.MFD_CLOEXEC)
    mask = np.ascontiguousarray(found.mask).view(np.uint8)
    for one in (np.ascontiguousarray(found.data), mask, found.boxes, np.frombuffer(found.wcs, np.uint8)):
        if one is None or not one.size:
            continue
        view = memoryview(np.ascontiguousarray(one).view(np.uint8).reshape(-1).data)
        while view:
            view = view[os.write(descriptor, view) :]
    return descriptor


def _limit(memory_bytes: int) -> None:
    """Bound what this process may take from now on."""
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115, PTH123
    space = pages * resource.getpagesize() + memory_bytes
    for kind, value in ((resource.RLIMIT_AS, space), (resource.RLIMIT_NOFILE, 256), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def main(descriptor: int, memory_bytes: int) -> None:
    """Answer messages until whoever asks has gone."""
    import h5py  # noqa: F401 - before the limit, as are the modules of astropy that come late
    from astropy.io.fits.hdu.compressed import compressed  # noqa: F401

    with socket.socket(fileno=descriptor) as connection:
        _limit(memory_bytes)
        connection.sendall(READY)
        while True:
            message, descriptors = _receive(connection, MAX_BANDS)
            if not message:
                return
            tree, pixels = _answer(message, descriptors)
            for one in descriptors:
                os.close(one)
            socket.send_fds(connection, [json.dumps(tree).encode()], [] if pixels is None else [pixels])
            if pixels is not None:
                os.close(pixels)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
