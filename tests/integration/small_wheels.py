"""A wheelhouse of one small wheel in the place of ours: its programs tell how they were called and what they can see and write."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

from deepdisc_ops.hpc.containers.wheelhouse import DETECTRON2, OURS, REQUIREMENTS

PROGRAM = """
import json, os, site, sys, time
from pathlib import Path

def writable(folder):
    try:
        path = Path(folder, "written")
        path.touch()
        path.unlink()
    except OSError as error:
        return error.strerror
    return True

def main():
    if sys.argv[1:3] == ["setup", "detectron2"]:
        assert Path(sys.argv[4]).read_text() == "detectron2"
    elif sys.argv[1:2] == ["serve"] or Path(sys.argv[0]).name == "mlflow":
        if "--fail" in sys.argv:
            sys.exit("this service cannot run")
        Path("service.json").write_text(json.dumps(sys.argv[1:]))
        time.sleep(600)
    elif sys.argv[1:2] == ["fill"]:
        Path(sys.argv[2], "full").write_bytes(b"0" * int(sys.argv[3]))
    else:
        told = {
            "words": sys.argv[1:], "uid": os.getuid(), "folder": os.getcwd(), "user_site": site.ENABLE_USER_SITE,
            "path": sys.path, "root": writable("/opt"), "here": writable("."), "tmp": writable("/tmp"),
        }
        try:
            import poison
            told["poisoned"] = poison.__file__
        except ImportError:
            told["poisoned"] = None
        print(json.dumps(told))
"""
CANARY = """
import os, sys
print("tried", sys.argv[1])
sys.exit(os.environ.get("CANARY_FAILS") == sys.argv[1])
"""


def make_wheelhouse(folder: Path) -> Path:
    """The wheelhouse, as `deepdisc_ops.hpc.containers.wheelhouse` would leave it."""
    (folder / DETECTRON2).mkdir(parents=True)
    (folder / DETECTRON2 / "small-1-py3-none-any.whl").write_text("detectron2")
    files = {
        "deepdisc_ops/__init__.py": "",
        "deepdisc_ops/program.py": PROGRAM,
        "deepdisc_ops/hpc/__init__.py": "",
        "deepdisc_ops/hpc/containers/__init__.py": "",
        "deepdisc_ops/hpc/containers/canary.py": CANARY,
        "deepdisc_ops-9.9.dist-info/METADATA": "Metadata-Version: 2.1\nName: deepdisc-ops\nVersion: 9.9\n",
        "deepdisc_ops-9.9.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "deepdisc_ops-9.9.dist-info/entry_points.txt": (
            "[console_scripts]\ndeepdisc-ops = deepdisc_ops.program:main\nmlflow = deepdisc_ops.program:main\n"
        ),
    }
    record = "".join(f"{name},sha256={_digest(text)},{len(text)}\n" for name, text in files.items())
    wheel = folder / "deepdisc_ops-9.9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr("deepdisc_ops-9.9.dist-info/RECORD", f"{record}deepdisc_ops-9.9.dist-info/RECORD,,\n")
    (folder / REQUIREMENTS).write_text(f"{OURS}==9.9 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    return folder


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
