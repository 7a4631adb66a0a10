"""Running an image: a verb, an app, its tests, or a shell."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from deepdisc_ops.errors import ConfigError, SetupError
from deepdisc_ops.hpc.containers.binds import bind_options
from deepdisc_ops.hpc.containers.build import labels
from deepdisc_ops.hpc.containers.runtime import Answer, Runtime, is_image, run_mode
from deepdisc_ops.hpc.containers.targets import load_targets

ROLES = ("train", "tune", "serve", "mlflow")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Place:
    """Where a container runs: its working folder, what else it sees, and its folder for what is temporary."""

    folder: Path
    binds: tuple[str, ...] = ()
    temporary: Path | None = field(default=None, metadata={"what": "bound at /tmp; that of --contain has 64 MB"})


@dataclass(frozen=True)
class Tested:
    """How the tests of a role ended."""

    role: str
    answer: Answer
    seconds: float


def options(runtime: Runtime, image: Path, place: Place, *, instance: bool = False) -> list[str]:
    """Options of exec, run, test and instance start for an image: by the machine, its target and the place."""
    if not is_image(image):
        raise SetupError(f"{image} is no image; build it with `deepdisc-ops images build`")
    if not place.folder.is_dir():
        raise ConfigError(f"the working folder {place.folder} does not exist")
    target = load_targets().get(labels(runtime, image).get("org.deepdisc-ops.target", ""))
    return [
        *run_mode(runtime.machine).options,
        *(target.flags if target else ()),
        *bind_options(place.binds, folder=place.folder.absolute(), temporary=place.temporary, enter=not instance),
    ]


def job_words(runtime: Runtime, image: Path, place: Place) -> list[str]:
    """What `environment.container` of a SLURM job is: nodes share the host's /tmp with the script, see tune/nodes.sbatch."""
    words = options(runtime, image, Place(place.folder, place.binds, Path("/tmp")))
    return [str(runtime.program), "exec", *words, str(image.absolute())]


def run(runtime: Runtime, image: Path, words: Sequence[str], place: Place, *, app: str | None = None) -> int:
    """Run a verb, or an app of the image, to its end with our input and output; its exit code. Signals are passed on."""
    check_app(app)
    with _temporary(place) as held:
        chosen = [*options(runtime, image, held), *(["--app", app] if app else [])]
        return _forwarding(runtime.command(["run"], [*chosen, str(image), *words]))


def shell(runtime: Runtime, image: Path, place: Place) -> int:
    """Open a shell inside."""
    with _temporary(place) as held:
        return _forwarding(runtime.command(["shell"], [*options(runtime, image, held), str(image)]))


def execute(runtime: Runtime, image: Path, words: Sequence[str], place: Place) -> Answer:
    """Run any program inside and keep what it says."""
    with _temporary(place) as held:
        return runtime.call(["exec"], [*options(runtime, image, held), str(image), *words])


def try_roles(runtime: Runtime, image: Path, place: Place, roles: Sequence[str] = ROLES) -> Iterator[Tested]:
    """The tests of the image's roles, each as it ends."""
    for role in roles:
        check_app(role)
        started = time.monotonic()
        with _temporary(place) as held:
            answer = runtime.call(["test"], [*options(runtime, image, held), "--app", role, str(image)])
        yield Tested(role, answer, time.monotonic() - started)


def check_app(app: str | None) -> None:
    """Raise `ConfigError` for an app that our images do not have."""
    if app is not None and app not in ROLES:
        raise ConfigError(f"no app {app!r}; expected one of {', '.join(ROLES)}")


@contextmanager
def _temporary(place: Place) -> Iterator[Place]:
    """A place with a folder for /tmp, made for the time of the block unless one is given."""
    if place.temporary is not None:
        yield place
        return
    folder = Path(tempfile.mkdtemp(prefix="dd-"))
    try:
        yield Place(place.folder, place.binds, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _forwarding(command: Sequence[str]) -> int:
    """Run a command in the foreground; signals to us reach it, and its end is ours."""
    with subprocess.Popen(list(command)) as process:
        before = {number: signal.signal(number, lambda caught, _: process.send_signal(caught)) for number in SIGNALS}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code
