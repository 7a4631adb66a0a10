"""What is released: a wheel and a source distribution that work outside of the repository, of one version everywhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import deepdisc_ops

ROOT = Path(__file__).parents[2]
EXAMPLE = {"deepdisc_ops": "__version__", "handlers": "ensemble_handler.py", "tune": "quick.yaml", "containers": "targets.toml"}
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both distributions, built from a copy of the tree without anything that git ignores."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = out.glob("*.tar.gz")
    source = tmp_path_factory.mktemp("source")
    with tarfile.open(archive) as file:
        file.extractall(source, filter="data")
    (tree,) = source.iterdir()
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)], cwd=tree, check=True, capture_output=True
    )
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    """The wheel that the source distribution makes, not the repository."""
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel and what it requires without an extra, and nothing else."""
    environment = tmp_path_factory.mktemp("an environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel)], check=True, capture_output=True)
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip())
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        required = metadata.PathDistribution(zipfile.Path(wheel, name.removesuffix("METADATA"))).requires or []
    for distribution in closure(required):
        link(distribution, site)
    return python.parent


def closure(required: Iterable[str]) -> list[metadata.Distribution]:
    """The distributions that satisfy requirements without extras, and those that they require."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(text) for text in required]
    while waiting:
        requirement = waiting.pop()
        extras = {"extra": ""} if not requirement.extras else {"extra": next(iter(requirement.extras))}
        if requirement.marker is not None and not requirement.marker.evaluate(extras):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name not in found:
            found[name] = metadata.distribution(name)
            waiting += [Requirement(text) for text in found[name].requires or []]
    return list(found.values())


def link(distribution: metadata.Distribution, site: Path) -> None:
    """Put a distribution's packages into another environment by links."""
    home = Path(str(distribution.locate_file("")))
    tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
    for top in tops:
        if not (site / top).exists():
            (site / top).symlink_to(home / top)


def ask(installed: Path, *words: str, folder: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """What the installed command answers in a folder without the repository, and without its environment."""
    environment = {"PATH": f"{installed}:/usr/bin:/bin", "HOME": str(folder), "LANG": "C.UTF-8", "COLUMNS": "100"}
    return subprocess.run(
        [str(installed / "deepdisc-ops"), *words], cwd=folder, env=environment, capture_output=True, text=True, check=check
    )


def test_the_wheel_holds_what_foreign_programs_open(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    for folder in ("containers", "handlers", "tune"):
        here = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
        for name in here or [str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()]:
            assert f"deepdisc_ops/_resources/{name}" in names
    for path in (ROOT / "deepdisc_ops").rglob("*"):
        if path.suffix in (".yaml", ".html", ".json", ".jinja", ".typed"):
            assert str(path.relative_to(ROOT)) in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/"))]


def test_the_source_distribution_holds_tests_docs_models_and_no_scratch(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        tops = {name.split("/")[1] for name in file.getnames() if "/" in name}
    assert {"tests", "docs", "models", "benchmarks", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE"} <= tops
    assert not tops & {".venv", "demo", "build", "dist", ".hypothesis", ".mypy_cache", "mlruns", "file:"}


def test_the_installed_command_works_without_extras_and_without_the_repository(wheel: Path, installed: Path, spaced: Path) -> None:
    assert ask(installed, "--version", folder=spaced).stdout.strip() == wheel.name.split("-")[1]
    assert "predict" in ask(installed, "--help", folder=spaced).stdout
    program = "import deepdisc_ops; from deepdisc_ops.resources import find; print(deepdisc_ops.__file__, *map(find, {}))"
    files = [f"{folder}/{name}" for folder, name in EXAMPLE.items() if folder != "deepdisc_ops"]
    told = subprocess.run(
        [str(installed / "python"), "-c", program.format(files)], cwd=spaced, capture_output=True, text=True, check=True, env={}
    ).stdout
    assert str(ROOT) not in told
    assert told.count("_resources") == len(files)
    refused = ask(installed, "train", "small", "--set", "data.path=nothing", folder=spaced, check=False)
    assert refused.returncode != 0


def test_doctor_names_what_such_an_environment_lacks_and_the_remedy(installed: Path, spaced: Path) -> None:
    found = {one["name"]: one for one in json.loads(ask(installed, "doctor", "--json", folder=spaced, check=False).stdout)}
    for name, remedy in {
        "detectron2": "deepdisc-ops setup detectron2",
        "Java": "pip install 'deepdisc-ops[serve]'",
        "[train]": "pip install 'deepdisc-ops[train]'",
        "GPU": "pip install 'deepdisc-ops[train]'",
    }.items():
        assert (found[name]["state"], found[name]["remedy"]) == ("absent", remedy)
        assert found[name]["enables"]


def test_one_version_everywhere(wheel: Path) -> None:
    """A tag is the version; what is written by hand, the citation and the changelog, names the last one or the next."""
    version = Version(wheel.name.split("-")[1])
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert re.search(rf"^## .*\b{re.escape(cited)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    # a checkout that was installed some commits ago says so; its series is the same
    installed = (metadata.version("deepdisc-ops"), deepdisc_ops.__version__)
    assert {Version(one).release[:2] for one in installed} == {version.release[:2]}
    if shutil.which("git") and (ROOT / ".git").exists():
        told = subprocess.run(["git", "tag", "--points-at", "HEAD", "v*"], cwd=ROOT, capture_output=True, text=True, check=True)
        if told.stdout.split() and not version.is_devrelease:  # a changed tree is already on the way to the next
            assert set(told.stdout.split()) == {f"v{version}"} == {f"v{cited}"}


def test_the_tag_is_the_version(built: Path, spaced: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(spaced, filter="data")
    (tree,) = spaced.iterdir()
    (tree / "PKG-INFO").unlink()  # what tells a source distribution its version
    (tree / "deepdisc_ops" / "_version.py").unlink()
    asked = [sys.executable, "-m", "hatchling", "version"]
    clean = {"PATH": os.environ["PATH"], "HOME": str(spaced), "GIT_CONFIG_GLOBAL": os.devnull}

    def told(*words: str) -> str:
        return subprocess.run(words, cwd=tree, env=clean, check=True, capture_output=True, text=True).stdout.strip()

    assert told(*asked) == "0.1.dev0"
    git = ["git", "-c", "user.name=n", "-c", "user.email=n@localhost"]
    told(*git, "init", "--quiet")
    told(*git, "add", ".gitignore", "pyproject.toml", "README.md")
    told(*git, "commit", "--quiet", "--message", "one")
    told(*git, "tag", "v1.2.3")
    assert told(*asked) == "1.2.3"
    told(*git, "commit", "--quiet", "--allow-empty", "--message", "two")
    assert told(*asked) == "1.2.4.dev1"


def test_every_extra_is_in_the_whole(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (whole,) = map(Requirement, project["optional-dependencies"]["all"])
    assert whole.extras == set(project["optional-dependencies"]) - {"all"}


@pytest.mark.slow
def test_the_main_job_through_the_installed_command(wheel: Path, spaced: Path) -> None:
    """A new environment from the package index, detectron2 by its verb, the demo in a folder of its own: 7 GB, half an hour."""
    environment = spaced / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    pins = ["-c", str(ROOT / "constraints.txt")]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins]
    subprocess.run([*pip, f"deepdisc-ops[sim,sweep,serve] @ {wheel.as_uri()}"], check=True)
    clean = {key: value for key, value in os.environ.items() if key in ("HOME", "LANG", "TMPDIR") or key.startswith("PIP_")}
    clean["PATH"] = f"{python.parent}:/usr/bin:/bin"
    subprocess.run(["deepdisc-ops", "setup", "detectron2"], env=clean, cwd=spaced, check=True)
    job = [str(python), "-m", "deepdisc_ops.demo", "--out", "demo", "--scenes", "24", "--mosaic", "512"]
    subprocess.run(job, env=clean, cwd=spaced, check=True)
    figures = json.loads((spaced / "demo" / "evaluation" / "metrics.json").read_text())
    assert figures["completeness"]["value"] > figures["completeness_chance"]
