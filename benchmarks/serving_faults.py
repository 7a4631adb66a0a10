"""An endpoint that is disturbed while a mosaic is predicted: ``python -m benchmarks.serving_faults [--quick] [--case NAME]``.

A committed ensemble, a simulated LSST mosaic, a server of one worker that is restarted when it dies. In each case something happens
to it after the first windows. A small window is sent every half second beside the others, without any retry: what it is answered,
and after how long it is served again. The catalogue is held against that of an undisturbed run: no window lost, no row doubled,
the rest the same, row for row; where windows had to be asked for in pieces, the same objects but for a few at the pieces' seams.
A difference ends the program with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGSTOP
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from astropy.table import Table
from rich.console import Console
from rich.table import Table as Printed

from benchmarks import record
from benchmarks.endpoints import EBV, Work, catalogue, differences, equal, prepared, serving
from benchmarks.mosaic import MODEL
from deepdisc_ops.serving import archive, server, wire
from deepdisc_ops.serving.fleet import Fleet
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.dust import EbvPlane
from deepdisc_ops.sky.images import SkyImage
from deepdisc_ops.sky.tiling import Window

WINDOW = 256
RESPONSE_TIMEOUT_S = 20
"""After which a worker counts as hung: longer than any window takes."""
PROBE_S = 0.5
AT_SEAMS = 0.03
"""Share of the rows that may be others where windows were asked for in pieces."""
PATIENCE_S = 600.0
console = Console(width=160, record=True)


class Watch(threading.Thread):
    """Sends a small window again and again, without any retry, and notes when which answer came."""

    def __init__(self, run: Path) -> None:
        super().__init__(daemon=True)
        self.answers: list[tuple[float, float, str]] = []
        self._run, self._over = run, threading.Event()

    def run(self) -> None:
        """Ask until told to stop."""
        while not self._over.wait(PROBE_S):
            asked = time.monotonic()
            answer = self._ask()
            self.answers.append((asked, time.monotonic(), answer))

    def stop(self) -> None:
        """Ask no more."""
        self._over.set()
        self.join()

    def wait_for_service(self, since: float) -> None:
        """Wait for a good answer to what was asked after ``since``, as long as the client's patience lasts."""
        while time.monotonic() < since + PATIENCE_S and not self._served(since):
            time.sleep(PROBE_S)

    def seconds_until_service(self, since: float) -> float:
        """From ``since`` to the first good answer after the last failure, to what was asked after both; NaN where there is none."""
        last = max((asked for asked, _, answer in self.answers if asked >= since and answer != "200"), default=since)
        return min((when - since for when in self._served(last)), default=float("nan"))

    def seen(self, since: float) -> dict[str, int]:
        """How often which failure was answered."""
        return dict(Counter(answer for _, when, answer in self.answers if when >= since and answer != "200"))

    def _served(self, since: float) -> list[float]:
        """When good answers came to what was asked after ``since``."""
        return [when for asked, when, answer in self.answers if asked >= since and answer == "200"]

    def _ask(self) -> str:
        try:
            info = server.discover(self._run)
            body, headers = wire.encode_image(np.zeros((len(info.bands), 64, 64), np.float32), info.bands, None, EBV)
            own = {**headers, "authorization": f"Bearer {info.token}", "content-type": wire.IMAGE_TYPE}
            reply = httpx.post(f"{info.url}{wire.PREDICT_PATH}", content=body, headers=own, timeout=120, trust_env=False)
        except Exception as error:  # noqa: BLE001 - whatever a client sees
            return type(error).__name__
        if reply.status_code == httpx.codes.OK:
            return "200"
        with suppress(ValueError, KeyError):
            return f"{reply.status_code} {reply.json().get('code')}"
        return str(reply.status_code)


@dataclass
class Scene:
    """A server and what the cases need to disturb it."""

    work: Work
    run: Path

    @property
    def info(self) -> server.ServerInfo:
        """The server as it is now."""
        return server.discover(self.run)

    def kill_worker(self) -> None:
        """End the worker by SIGKILL."""
        for pid in self.info.worker_pids:
            with suppress(ProcessLookupError):
                os.kill(pid, SIGKILL)


def worker_killed(scene: Scene) -> None:
    """The worker gets a SIGKILL."""
    scene.kill_worker()


def jvm_killed(scene: Scene) -> None:
    """The JVM gets a SIGKILL."""
    os.kill(scene.info.pid, SIGKILL)


def worker_hangs(scene: Scene) -> None:
    """The worker stops where it is."""
    for pid in scene.info.worker_pids:
        os.kill(pid, SIGSTOP)


def no_memory(scene: Scene) -> None:
    """The worker may take no more memory than it has, for ten seconds."""
    for pid in scene.info.worker_pids:
        process = psutil.Process(pid)
        process.rlimit(resource.RLIMIT_AS, (process.memory_info().vms + (8 << 20), resource.RLIM_INFINITY))
        time.sleep(10)
        with suppress(psutil.NoSuchProcess):
            process.rlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def queue_overflows(scene: Scene) -> None:
    """Forty more requests at once than the queue takes."""
    image = scene.work.mosaic.read(Window(0, 0, WINDOW, WINDOW))
    with Fleet.open([scene.run], most=64, patience_s=PATIENCE_S) as crowd, ThreadPoolExecutor(40) as pool:
        list(pool.map(lambda _: crowd.predict(image, EBV), range(40)))


def reply_over_limit(scene: Scene) -> None:
    """The server's workers may not answer as much as a window holds: settings are changed, and workers read them again."""
    file = next(scene.run.rglob("service.json"))
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"reply_bytes": 1 << 15}))
    scene.kill_worker()


def token_worthless(scene: Scene) -> None:
    """The token is renewed twice, which ends the one in use."""
    for _ in range(2):
        server.renew_tokens(scene.run)
        time.sleep(1)


def bad_clients(scene: Scene) -> None:
    """Twenty clients send half a window, some slowly, and hang up."""
    url, info = httpx.URL(scene.info.url), scene.info
    head = (
        f"POST {wire.PREDICT_PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {info.token}\r\nContent-Type: {wire.IMAGE_TYPE}\r\n"
        f"Content-Length: 1000000\r\n\r\n"
    ).encode()

    def half(number: int) -> None:
        with suppress(OSError), socket.create_connection((url.host, url.port or 80)) as connection:
            connection.sendall(head)
            for _ in range(10 if number % 2 else 1):
                connection.sendall(bytes(20_000))
                time.sleep(0.3 if number % 2 else 0)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(half, range(20)))


def disk_full(scene: Scene) -> None:
    """JVM, worker and supervisor cannot make a file longer for five seconds, as on a full disk."""
    info = scene.info
    processes = [psutil.Process(pid) for pid in (info.pid, info.supervisor_pid, *info.worker_pids)]
    for process in processes:
        process.rlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    time.sleep(5)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def stopped(scene: Scene) -> None:
    """The server is stopped with windows in flight and started again."""
    server.stop(scene.run)
    server.start(scene.work.mar, scene.run, threads=1, **SETTINGS)


def upgraded(scene: Scene) -> None:
    """An archive of the same members and another version is taken into service, and given up again."""
    server.upgrade(scene.run, archive.build_archive([MODEL], scene.work.folder / "next.mar", on_failure="skip"))
    server.rollback(scene.run)


CASES: dict[str, Callable[[Scene], None]] = {
    case.__name__: case
    for case in (
        worker_killed,
        jvm_killed,
        worker_hangs,
        no_memory,
        queue_overflows,
        reply_over_limit,
        token_worthless,
        bad_clients,
        disk_full,
        stopped,
        upgraded,
    )
}
IN_PIECES = {"no_memory", "reply_over_limit"}
SETTINGS: dict[str, Any] = {"restart": True, "response_timeout_s": RESPONSE_TIMEOUT_S}


def disturb(work: Work, case: str, expected: Table) -> dict[str, Any]:
    """One mosaic through a server of its own that the case befalls, and what became of it."""
    begun = threading.Semaphore(0)
    with serving(work, case, **SETTINGS) as (run,), Fleet.open([run], patience_s=PATIENCE_S, mixed=True) as fleet:

        def predict(image: SkyImage, ebv: EbvPlane) -> Detections:
            found = fleet.predict(image, ebv)
            begun.release()
            return found

        watch = Watch(run)
        watch.start()
        with ThreadPoolExecutor(1) as pool:
            table = pool.submit(catalogue, work, predict, WINDOW, fleet.room)
            for _ in range(2):  # a third window is in flight then
                begun.acquire()
            since = time.monotonic()
            CASES[case](Scene(work, run))
            found = table.result()
        watch.wait_for_service(since)
        watch.stop()
        waited = dict(fleet.trouble)
    difference = differences(found, expected)
    moved = difference["lost"] + difference["added"]
    at_seams = case in IN_PIECES and difference["doubled"] == 0 and moved <= AT_SEAMS * len(expected)
    return {
        "case": case,
        "seen without retries": watch.seen(since),
        "waited out": waited,
        "seconds until service": watch.seconds_until_service(since),
        "catalogue": difference,
        "fine": equal(difference) or at_seams,
    }


def main() -> None:
    """Disturb, look, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="this alone; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a mosaic of 512 pixels, the worker's SIGKILL alone; nothing is kept")
    arguments = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    cases = arguments.case or (["worker_killed"] if arguments.quick else list(CASES))
    torch.set_num_threads(1)
    rows = []
    side = 512 if arguments.quick else 1024
    with tempfile.TemporaryDirectory(prefix="serving-faults-") as scratch, prepared(Path(scratch), side) as work:
        with serving(work, "undisturbed") as (run,), Fleet.open([run]) as fleet:
            expected = catalogue(work, fleet.predict, WINDOW, fleet.room)
        for case in cases:
            rows.append(disturb(work, case, expected))
            print(rows[-1], flush=True)
    table = Printed("befell", "a client without retries saw", "ours waited out", "s until service", "catalogue", "verdict")
    for row in rows:
        seen, waited = (
            "; ".join(f"{count} x {what[:60]}" for what, count in row[name].items())
            for name in ("seen without retries", "waited out")
        )
        lost = ", ".join(f"{row['catalogue'][name]} {name}" for name in ("rows", "lost", "added", "doubled"))
        verdict = "as undisturbed" if equal(row["catalogue"]) else "the same but at seams" if row["fine"] else "DIFFERS"
        table.add_row(row["case"], seen or "-", waited or "-", f"{row['seconds until service']:.1f}", lost, verdict)
    console.print(table)
    wrong = sum(not row["fine"] for row in rows)
    if not arguments.quick:
        ratios = {"undisturbed_catalogues": 1 - wrong / len(rows)}
        figures = {"rows": len(expected), "window": WINDOW, "cases": rows}
        console.print(str(record.write("serving_faults", ratios=ratios, figures=figures, log=console.export_text().splitlines())))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
