"""What each role of an image must be able to do, tried: ``python -m deepdisc_ops.hpc.containers.canary ROLE``.

Run by the tests of the image, in a folder that is removed; each is the role's own verb on a sky of a few small scenes.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import yaml

PATIENCE_S = 300.0
TINY = {
    "model": {
        "backbone": {"name": "tiny", "fpn_channels": 16},
        "box_head": {"hidden": [32]},
        "redshift_head": {"hidden": [32, 16]},
    },
    "train": {"steps": 2, "validate_every": 2},
}


class Failed(Exception):
    """A role cannot do its work; what it printed says why."""


def train(folder: Path) -> None:
    """Two steps of the smallest network on two simulated scenes."""
    verb(
        "simulate",
        "--survey",
        "lsst",
        "--out",
        folder / "scenes",
        "--train",
        "2",
        "--validation",
        "1",
        "--size",
        "128",
        "--processes",
        "1",
    )
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump({"preset": "small", **TINY, "data": {"path": str(folder / "scenes")}}))
    verb("train", config, "--out", folder / "run")


def tune(folder: Path) -> None:
    """Two trials of it under Ray, tracked in MLflow."""
    verb(
        "simulate",
        "--survey",
        "lsst",
        "--out",
        folder / "scenes",
        "--train",
        "2",
        "--validation",
        "1",
        "--size",
        "128",
        "--processes",
        "1",
    )
    spec = {
        "name": "canary",
        "base": {"preset": "small", **TINY, "data": {"path": str(folder / "scenes")}},
        "space": {"train.lr": {"grid": [0.001, 0.0005]}},
        "metric": "val_nll",
        "scheduler": {"name": "fifo"},
        "resources": {"cpus": 1},
    }
    (folder / "canary.yaml").write_text(yaml.safe_dump(spec))
    verb("sweep", "run", folder / "canary.yaml", "--out", folder / "sweep")


def serve(folder: Path) -> None:
    """An archive of it served, whose own canary is answered before the endpoint says that it is ready."""
    train(folder)
    verb("archive", "build", folder / "run" / "best", "--out", folder / "canary.mar")
    try:
        verb("serve", "start", folder / "canary.mar", "--run-dir", folder / "server")
        verb("serve", "status", "--run-dir", folder / "server")
    finally:
        verb("serve", "stop", "--run-dir", folder / "server")


def mlflow(folder: Path) -> None:
    """MLflow's server over a new store, until it says that it is well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (folder / "mlflow.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"], cwd=folder, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + PATIENCE_S
        while not _well(f"http://127.0.0.1:{port}/health"):
            if server.poll() is not None or time.monotonic() > end:
                raise Failed(f"mlflow server is not well: {(folder / 'mlflow.log').read_text()[-2000:]}")
            time.sleep(0.5)
    finally:
        server.terminate()
        server.wait(60)


ROLES: dict[str, Callable[[Path], None]] = {"train": train, "tune": tune, "serve": serve, "mlflow": mlflow}


def verb(*words: str | Path) -> None:
    """Run a verb of deepdisc-ops. Raises `Failed` with what it said."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "deepdisc_ops", *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Failed(f"deepdisc-ops {' '.join(map(str, words))}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def main(arguments: Sequence[str]) -> int:
    """Try one role; the exit code."""
    if len(arguments) != 1 or arguments[0] not in ROLES:
        sys.stderr.write(f"usage: canary ROLE, one of {', '.join(ROLES)}\n")
        return 2
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dd-") as folder:
        try:
            ROLES[arguments[0]](Path(folder))
        except Failed as failure:
            sys.stderr.write(f"{arguments[0]}: {failure}\n")
            return 1
    sys.stdout.write(f"{arguments[0]}: well, {time.monotonic() - started:.0f} s\n")
    return 0


def _well(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
