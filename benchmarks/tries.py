"""What was tried before the committed member, and what each thing was worth: ``python -m benchmarks.tries RUN RUN ...``.

The runs are folders of `deepdisc-ops train small --set data.path=lsst_reference ...`, the first of them the preset as it is; all
took as many steps, about 20 minutes on one core of two. A row says in which settings a run differs from the first, and how its
best checkpoint validates beside the first's. A run that was given up early says so by its step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import record
from deepdisc_ops.config import TrainingConfig, flatten
from deepdisc_ops.model.weights import WEIGHTS, MemberInfo, read_info
from deepdisc_ops.training.checkpoint import read_history

METRICS = ("val_nll", "val_sigma_iqr", "val_outliers", "val_completeness")
MACHINE = ("data.path", "data.cache_gb", "train.threads", "train.ranks", "train.save_every", "train.validate_every")
"""Settings that say where and how often, not what."""


def settings(config: TrainingConfig) -> dict[str, str]:
    """What a run was trained with, by dotted key; how it detects afterwards is no part of it."""
    flat = flatten(config.model_dump(mode="json", exclude={"inference"}))
    return {key: value for key, value in flat.items() if key not in MACHINE}


def changes(info: MemberInfo, first: MemberInfo) -> dict[str, str]:
    """The settings in which a run differs from the first."""
    base = settings(first.config)
    return {key: value for key, value in settings(info.config).items() if base.get(key) != value}


def main() -> None:
    """Read, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of trainings; the first is what the others are compared with")
    arguments = parser.parse_args()
    members = [read_info(run / "best") for run in arguments.runs]
    table = Table("changed", "step", "of", *METRICS)
    rows = []
    for run, info in zip(arguments.runs, members, strict=True):
        changed = changes(info, members[0])
        shown = ", ".join(f"{key} {value}" for key, value in changed.items()) or "nothing: preset small"
        values = [info.metrics[name] for name in METRICS]
        table.add_row(shown, str(info.step), str(info.config.train.steps), *(f"{value:.4f}" for value in values))
        rows.append(
            {
                "changed": changed,
                "step": info.step,
                "steps": info.config.train.steps,
                "weights_mb": round((run / "best" / WEIGHTS).stat().st_size / 1e6, 1),
                "commit": info.git_commit,
                **{name: round(info.metrics[name], 4) for name in METRICS},
                "curves": [{key: entry[key] for key in ("step", *METRICS)} for entry in read_history(run / "last")],
            }
        )
    console = Console(width=140, record=True)
    console.print(table)
    print(record.write("tries", ratios={}, figures={"tries": rows}, log=console.export_text().splitlines()))


if __name__ == "__main__":
    main()
