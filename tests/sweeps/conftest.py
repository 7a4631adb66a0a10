"""Makes `learning_curves` importable by name, here and in processes that inherit PYTHONPATH."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
