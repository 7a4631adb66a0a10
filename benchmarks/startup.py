"""How long a first word takes: ``import deepdisc_ops``, ``--help``, and the help of every group of verbs.

`python -m benchmarks.startup [--quick]` starts each so many times in turn, in a process of its own, and tells the median wall time;
an empty Python's is taken off, as no program can be faster. On a machine that does other things figures are larger: the CPU time
stands beside them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

from benchmarks import record

BOUNDS_S = {"import": 0.1, "help": 0.7}
"""What issue 10 asks for."""
PROGRAMS = {
    "nothing": "pass",
    "import": "import deepdisc_ops",
    "help": "import sys; sys.argv = ['deepdisc-ops', '--help']; from deepdisc_ops.cli import main; main()",
    "predict_help": "import sys; sys.argv = ['deepdisc-ops', 'predict', '--help']; from deepdisc_ops.cli import main; main()",
}


def start(program: str) -> tuple[float, float]:
    """Wall and CPU seconds of a process that runs ``program``; what it prints is dropped."""
    before, started = os.times(), time.perf_counter()
    quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", program], os.environ, file_actions=quiet)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{program} ended with {os.waitstatus_to_exitcode(status)}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, cpu


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 starts of each instead of 25, and no result is kept")
    repeats = 5 if parser.parse_args().quick else 25
    for program in PROGRAMS.values():
        start(program)  # fills the file cache
    taken = [{name: start(program) for name, program in PROGRAMS.items()} for _ in range(repeats)]
    figures, log = {}, []
    for name in PROGRAMS:
        wall, cpu = (statistics.median(round_[name][kind] for round_ in taken) for kind in (0, 1))
        figures |= {f"{name}_s": round(wall, 4), f"{name}_cpu_s": round(cpu, 4)}
        log.append(f"{name}: {wall:.3f} s, {cpu:.3f} s of CPU")
    ratios = {
        f"{name}_over_bound": round((figures[f"{name}_s"] - figures["nothing_s"]) / bound, 3) for name, bound in BOUNDS_S.items()
    }
    log += [f"{name}: {value}" for name, value in ratios.items()]
    print("\n".join(log))
    if repeats > 5:
        record.write("startup", ratios=ratios, figures=figures | {"starts": repeats}, log=log)


if __name__ == "__main__":
    main()
