"""Without the extra, the room says what to install."""

from __future__ import annotations

import subprocess
import sys


def test_a_missing_rail_is_told_in_a_line() -> None:
    code = "import sys; sys.modules['rail'] = None; import deepdisc_ops.rail"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("deepdisc_ops.errors.SetupError: RAIL cannot be imported")
    assert last.endswith("install it with pip install 'deepdisc-ops[rail]'")
