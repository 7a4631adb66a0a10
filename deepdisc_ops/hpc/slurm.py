"""SLURM's job scripts: rendered by a pure function from ``tune/*.sbatch``, submitted in one place.

::

    script = render(load_job(Path("nodes"), ("nodes=2", "gpus=4")), load_site("delta", ("account=bbka-delta-gpu",)))
    Path("sweep.sbatch").write_text(script)
    job_id = submit(Path("sweep.sbatch"))

A script gives a driver everything it needs (Ray over the nodes, a token, a folder), warns it ahead of the time limit, and queues
itself again if the driver ends with `Requeue`'s exit code: all is saved then, and the same command goes on.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

from deepdisc_ops.errors import ConfigError, Requeue, SetupError
from deepdisc_ops.hpc.jobs import SCRATCH, TASK, JobSettings, SiteSettings, check
from deepdisc_ops.ray_session import ENVIRONMENT, OBJECT_STORE_BYTES
from deepdisc_ops.resources import find

PATIENCE_S = 120
"""How long sbatch may take to answer; controllers are busy at times."""


def render(job: JobSettings, site: SiteSettings) -> str:
    """The text of the job's script for sbatch. Raises `ConfigError` if the site cannot run the job."""
    import jinja2

    check(job, site)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(find("tune")),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="<#",  # as ${#array[@]} is the length of an array
        comment_end_string="#>",
    )
    environment.filters |= {"quote": quote, "path": _shell_path}
    return environment.get_template(f"{job.kind}.sbatch").render(
        job=job,
        site=site,
        directives=directives(job, site),
        ray={"environment": ENVIRONMENT, "object_store_bytes": OBJECT_STORE_BYTES},
        requeue_code=Requeue.exit_code,
    )


def directives(job: JobSettings, site: SiteSettings) -> list[str]:
    """What the script asks of SLURM: the options of its ``#SBATCH`` lines."""
    task = "%A_%a" if job.array else "%j"
    options: dict[str, str | int | None] = {
        "job-name": job.name,
        "account": job.account or site.account,
        "partition": job.partition or site.partition,
        "qos": job.qos or site.qos,
        "constraint": job.constraint or site.constraint,
        "time": job.time,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks,
        "cpus-per-task": job.cpus,
        "gpus-per-node": job.gpus or None,
        "mem": job.memory,
        "array": job.array,
        "chdir": job.folder,
        "output": job.log or f"{job.name}-{task}.log",
        "open-mode": "append",
        "signal": f"B:USR1@{job.signal_s}",
    }
    given = [f"--{name}={_directive_value(str(value))}" for name, value in options.items() if value is not None]
    return [*given, "--requeue", *(["--no-kill"] if job.kind == "nodes" else [])]


def quote(text: str) -> str:
    """One word of the shell: all of it literal but ``{task}`` and ``{scratch}``, which are variables of the script."""
    variables = {TASK: '"$SLURM_ARRAY_TASK_ID"', SCRATCH: '"$scratch"'}
    pieces = re.split(f"({re.escape(TASK)}|{re.escape(SCRATCH)})", text)
    return "".join(variables.get(piece) or shlex.quote(piece) for piece in pieces if piece) or "''"


def submit(script: Path) -> str:
    """Submit a script and return the id of its job, after sbatch has found nothing to object to.

    Raises `SetupError` where there is no SLURM or it does not answer, `ConfigError` with sbatch's own words where it refuses.
    """
    if shutil.which("sbatch") is None:
        raise SetupError("sbatch is not on PATH; submit from a login node of the cluster, or load its SLURM module")
    if not script.is_file():
        raise ConfigError(f"job script {script} does not exist; write one with `deepdisc-ops slurm render`")
    _check_folders(script)
    _sbatch("--test-only", str(script))
    answer = _sbatch("--parsable", str(script))
    if (found := re.search(r"^(\d+)(;\S+)?$", answer, re.MULTILINE)) is None:
        raise SetupError(f"sbatch answered {answer!r}; expected the id of a job, look for it with squeue")
    return found[1]


def _check_folders(script: Path) -> None:
    """A job whose folder or log cannot be opened fails without a word."""
    lines = re.findall(r"^#SBATCH --(chdir|output)=(.*)$", script.read_text(), re.MULTILINE)
    given = {name: shlex.split(value)[0] for name, value in lines}
    folder = Path(given.get("chdir", "."))
    for path in (folder, (folder / given.get("output", "log")).parent):
        if "%" not in str(path) and not path.is_dir():
            raise ConfigError(f"{script}: folder {path} does not exist; SLURM makes none, a job without it fails: mkdir -p it")


def _sbatch(*arguments: str) -> str:
    """What sbatch prints; its complaint as an error."""
    try:
        done = subprocess.run(["sbatch", *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        raise SetupError(f"sbatch has not answered within {PATIENCE_S} s; see sinfo, and squeue for what was submitted") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"nothing, with exit code {done.returncode}"
        raise ConfigError(f"sbatch refuses {arguments[-1]}: {said}")
    return done.stdout.strip()


def _directive_value(text: str) -> str:
    """A value as sbatch reads it from the script: its quotes are not quite the shell's, those of C are common to both."""
    return text if re.fullmatch(r"[\w%.,:/@+*=-]+", text) else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _shell_path(text: str) -> str:
    """A path that may begin with a variable, which the shell is to put in."""
    found = re.match(r"\$(\w+)(.*)", text)
    return f'"${{{found[1]}:?}}"{shlex.quote(found[2]) if found[2] else ""}' if found else shlex.quote(text)
