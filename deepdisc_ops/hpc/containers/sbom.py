"""What is in an image, as CycloneDX by cyclonedx-py, and what is known against it, by pip-audit where the index tells."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepdisc_ops.errors import SetupError
from deepdisc_ops.hpc.containers.render import PREFIX
from deepdisc_ops.hpc.containers.run import Place, execute
from deepdisc_ops.hpc.containers.runtime import Runtime

INSTALLED = f"{PREFIX}/requirements.txt"
"""The wheelhouse's requirements, kept in the image."""
DPKG = "${Package} ${Version} ${Architecture}\\n"


class Audit(NamedTuple):
    """What is known against packages: rows of package, version, id and fixed; and the packages that the index knows nothing of."""

    known: list[dict[str, str]]
    untold: list[str]


def bill(runtime: Runtime, image: Path, out: Path) -> int:
    """Write an image's bill of materials, Python's packages by their hashes and Debian's; returns how many there are."""
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch, "requirements.txt")
        listed.write_text(_inside(runtime, image, ["cat", INSTALLED]))
        answer = _tool(
            "cyclonedx_py", "cyclonedx-bom", ["requirements", "--output-format", "JSON", "--output-reproducible", str(listed)]
        )
    tree: dict[str, Any] = json.loads(answer.stdout)
    debian = [debian_component(line) for line in _inside(runtime, image, ["dpkg-query", "-W", "-f", DPKG]).splitlines()]
    tree["components"] = [*tree.get("components", []), *debian]
    tree.setdefault("metadata", {})["component"] = {"type": "container", "bom-ref": image.name, "name": image.name}
    out.write_text(json.dumps(tree, indent=2) + "\n")
    return len(tree["components"])


def debian_component(line: str) -> dict[str, str]:
    """A component from a line of dpkg-query: name, version, architecture."""
    name, version, architecture = line.split()
    purl = f"pkg:deb/debian/{name}@{version}?arch={architecture}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def audit(runtime: Runtime, image: Path) -> Audit:
    """Known vulnerabilities of an image's Python packages, our own left out.

    Raises `SetupError` where the index tells nothing of any.
    """
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch, "requirements.txt")
        listed.write_text(
            "\n".join(line for line in _inside(runtime, image, ["cat", INSTALLED]).splitlines() if "deepdisc-ops" not in line)
        )
        words = ["--requirement", str(listed), "--require-hashes", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
        answer = _tool("pip_audit", "pip-audit", words, accepted=(0, 1))
    return read_audit(answer.stdout, answer.stderr)


def read_audit(report: str, said: str = "") -> Audit:
    """The `Audit` in a JSON report of pip-audit, which ``said`` something beside it."""
    try:
        packages = json.loads(report)["dependencies"]
    except (ValueError, KeyError):
        raise SetupError(f"the index tells no vulnerabilities: {_last(said)}; audit where its API is reached") from None
    untold = [one["name"] for one in packages if "skip_reason" in one]
    if packages and len(untold) == len(packages):
        why = packages[0]["skip_reason"]
        raise SetupError(f"the index tells nothing of {len(untold)} packages ({why}); audit where its API is reached")
    known = [
        {"package": one["name"], "version": one["version"], "id": fault["id"], "fixed": ", ".join(fault["fix_versions"])}
        for one in packages
        for fault in one.get("vulns", [])
    ]
    return Audit(known, untold)


def _inside(runtime: Runtime, image: Path, words: Sequence[str]) -> str:
    answer = execute(runtime, image, words, Place(Path("/")))
    if answer.code:
        raise SetupError(f"{image} is no image of deepdisc-ops: {words[0]} in it says {answer.fault}")
    return answer.out


def _tool(module: str, distribution: str, words: Sequence[str], accepted: Sequence[int] = (0,)) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec(module) is None:
        raise SetupError(f"{distribution} is not installed; install deepdisc-ops[containers]")
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False)
    if done.returncode not in accepted:
        raise SetupError(f"{distribution} failed: {_last(done.stderr)}")
    return done


def _last(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["nothing was said"])[-1]
