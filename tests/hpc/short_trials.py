"""``deepdisc-ops sweep run`` for the test of two nodes: the real one, but for the training, which only notes where it is.

As a module, a training function that Ray's workers import by name; as a program, the command.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import learning_curves

from deepdisc_ops.config import TrainingConfig

Report = Callable[[int, Mapping[str, float]], None]
NOTES = "nodes.jsonl"


def train(config: TrainingConfig, out: Path, *, report: Report) -> Path:
    import ray

    def noting(step: int, metrics: Mapping[str, float]) -> None:
        with (out / NOTES).open("a") as file:
            file.write(json.dumps({"step": step, "node": ray.util.get_node_ip_address()}) + "\n")
        report(step, metrics)

    return learning_curves.train(config, out, report=noting)


def main() -> None:
    import short_trials

    from deepdisc_ops.errors import DeepdiscOpsError
    from deepdisc_ops.sweeps.run import run_sweep
    from deepdisc_ops.sweeps.space import load_spec

    parser = argparse.ArgumentParser()
    parser.add_argument("verbs", nargs=2)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ray-address", required=True)
    asked = parser.parse_args()
    assert asked.verbs == ["sweep", "run"]
    try:
        result = run_sweep(load_spec(asked.spec), asked.out, ray_address=asked.ray_address, train=short_trials.train)
    except DeepdiscOpsError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    (asked.out / "result.json").write_text(json.dumps([[one.state, one.step] for one in result.trials]))


if __name__ == "__main__":
    main()
