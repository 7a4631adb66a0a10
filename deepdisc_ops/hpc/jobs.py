"""What a SLURM job asks for, and what is particular to the centre it is sent to.

::

    kind: nodes                            # node: one machine; nodes: Ray over several; array: a task per fold; ddp: ranks by srun
    name: sweep
    command: [sweep, run, tune/backbones.yaml, --out, "{scratch}/sweeps/backbones"]
    time: "24:00:00"                       # quoted: to YAML it is a number otherwise
    nodes: 2
    cpus: 64                               # a task, as gpus and memory are a node
    gpus: 4
    environment: {venv: /projects/photoz/venv}

``{scratch}`` in the command becomes the site's scratch folder, ``{task}`` the number of an array's task.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from deepdisc_ops import config as settings
from deepdisc_ops.config import Settings
from deepdisc_ops.errors import ConfigError
from deepdisc_ops.resources import find

Kind = Literal["node", "nodes", "array", "ddp"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TASK, SCRATCH = "{task}", "{scratch}"
LONGEST_SIGNAL_S = 65535
DURATION = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


def seconds(text: str) -> int:
    """SLURM's time limits: minutes, M:S, H:M:S, D-H, D-H:M and D-H:M:S; ValueError for anything else, and for no time at all."""
    match = DURATION.fullmatch(text)
    if match is None:
        raise ValueError("no time limit; expected minutes, H:MM:SS or D-HH:MM:SS, as in 1-12:00:00")
    parts = [int(part) for part in match["parts"].split(":")]
    units = (3600, 60, 1) if match["days"] or len(parts) == 3 else (60, 1)
    total = int(match["days"] or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))
    if total == 0:
        raise ValueError("a job without time never runs; give at least a minute")
    return total


def _one_line(text: str) -> str:
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError("holds a line break or another control character; a directive is one line of text")
    return text


def _duration(found: Any) -> Any:
    if isinstance(found, int):
        raise ValueError("a number, which is what YAML makes of 24:00:00; put it in quotes, or write days first, as in 1-00:00:00")
    if isinstance(found, str):
        seconds(found)
    return found


def _task_list(text: str) -> str:
    if not re.fullmatch(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?", text):
        raise ValueError("no list of tasks; expected numbers and ranges such as 0-9, 0,3,5 or 0-9%4 (four at once)")
    tasks, _, at_once = text.partition("%")
    for part in tasks.split(","):
        first, _, rest = part.partition("-")
        last, _, step = rest.partition(":")
        if rest and int(last) < int(first):
            raise ValueError(f"the range {part} runs backwards; write {last}-{first}")
        if step and int(step) == 0:
            raise ValueError(f"the range {part} has a step of 0; leave it out")
    if at_once and int(at_once) == 0:
        raise ValueError("%0 lets no task run; leave it out, or give how many may run at once")
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_one_line)]
Token = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:/@+-]*$", max_length=120)]
"""Names that SLURM gives to accounts, partitions and their like."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=60)]
Duration = Annotated[str, BeforeValidator(_duration)]
Memory = Annotated[str, Field(pattern=r"^\d+[KMGT]?$")]
TaskList = Annotated[str, AfterValidator(_task_list)]
Variables = dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], Text]
Absolute = Annotated[Text, Field(pattern=r"^/")]


class Environment(Settings):
    """Where deepdisc-ops is found: in a virtual environment, behind a container command, or, without either, on PATH."""

    venv: Absolute | None = None
    container: tuple[Text, ...] | None = Field(
        None, min_length=1, description="words before the command, such as [apptainer, exec, --nv, /images/train.sif]"
    )

    @model_validator(mode="after")
    def _one(self) -> Environment:
        if self.venv is not None and self.container is not None:
            raise ValueError("names a venv and a container; give one of them, the container has its own Python")
        return self


class TrackingStore(Settings):
    """Where a sweep is recorded. SQLite fails on parallel file systems: the job writes to its node and copies it out at the end."""

    uri: Text = Field(description="MLflow store, such as http://tracking.example.org:5000 or sqlite:////home/me/mlflow.db")
    node_local: Absolute | None = Field(
        None, description="a folder of the node to work in; the runs are kept in NAME-records and go to uri by `track sync`"
    )


class SiteSettings(Settings):
    """A computing centre, as ``tune/sites`` holds them."""

    name: Name = "generic"
    tried: bool = Field(False, description="whether we have run there; else the profile is read from public documentation")
    account: Token | None = None
    account_form: Text | None = Field(None, description="what an account looks like there, where jobs need one")
    partition: Token | None = None
    qos: Token | None = None
    constraint: Annotated[str, Field(pattern=r"^[\w&|*()\[\].,-]+$", max_length=120)] | None = None
    gpus_per_node: NonNegativeInt | None = Field(None, description="the most that a node has; unknown when not given")
    cpus_per_node: PositiveInt | None = Field(None, description="as SLURM counts them: hardware threads where these are on")
    longest: Duration | None = Field(None, description="the time limit of the partition or QOS")
    modules: tuple[Token, ...] = ()
    scratch: Annotated[Text, Field(pattern=r"^(/|\$[A-Za-z_])")] | None = Field(
        None, description="the parallel file system: a path, which may begin with a variable such as $SCRATCH"
    )
    variables: Variables = Field({}, description="environment of every process, above all of the interconnect")


class JobSettings(Settings):
    """One job, complete but for the site."""

    kind: Kind = "node"
    name: Name = "deepdisc-ops"
    command: tuple[Text, ...] = Field((), description="words after deepdisc-ops: train ..., sweep run ...")
    time: Duration = "1:00:00"
    nodes: PositiveInt = 1
    tasks: PositiveInt = Field(1, description="ddp: ranks a node, one for each GPU")
    cpus: PositiveInt = Field(1, description="CPUs a task; all but ddp have one task a node")
    gpus: NonNegativeInt = Field(0, description="GPUs a node")
    memory: Memory | None = Field(None, description="a node, such as 200G; 0 for all of it")
    array: TaskList | None = Field(None, description="array: its tasks, such as 0-9, or 0-9%4 for four at once")
    account: Token | None = Field(None, description="in the place of the site's, as are the three below")
    partition: Token | None = None
    qos: Token | None = None
    constraint: Annotated[str, Field(pattern=r"^[\w&|*()\[\].,-]+$", max_length=120)] | None = None
    folder: Absolute | None = Field(
        None, description="where the job runs, on a file system of all nodes; where it is submitted else"
    )
    log: Text | None = Field(
        None, description="file of its output, with SLURM's %x (name) and %j (job); NAME-JOB.log when not given"
    )
    signal_s: Annotated[int, Field(ge=30, le=LONGEST_SIGNAL_S)] = Field(
        300, description="so long before the time limit the job saves its state and is queued again"
    )
    requeues: NonNegativeInt = Field(20, description="times it may be queued again")
    join_s: PositiveInt = Field(300, description="nodes: so long they may take to join Ray")
    environment: Environment = Environment()
    tracking: TrackingStore | None = None

    @field_validator("memory", "array", mode="before")
    @classmethod
    def _number_as_text(cls, found: Any) -> Any:
        return str(found) if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else found

    @model_validator(mode="after")
    def _consistent(self) -> JobSettings:
        if faults := [*self._extent_faults(), *self._command_faults()]:
            raise ValueError("; ".join(faults))
        return self

    def _extent_faults(self) -> Iterator[str]:
        """What kind, time and size of the job have against each other."""
        if self.signal_s >= seconds(self.time):
            yield f"signal_s {self.signal_s} is not before the time limit {self.time}; give the job more time, or less to save"
        if self.kind in ("node", "array") and self.nodes > 1:
            yield f"nodes is {self.nodes} for a job of kind {self.kind}, which uses one; take kind nodes or ddp"
        if self.kind != "ddp" and self.tasks > 1:
            yield f"tasks is {self.tasks} for a job of kind {self.kind}, which has one a node; take kind ddp"
        if self.kind == "ddp" and self.nodes * self.tasks < 2:
            yield "kind ddp with one task on one node has one rank; raise tasks or nodes, or take kind node"
        if self.kind == "ddp" and self.gpus and self.tasks > self.gpus:
            yield f"tasks is {self.tasks} for {self.gpus} GPUs a node; each rank takes one"
        if self.kind == "array" and self.array is None:
            yield "kind array without array; name its tasks, such as 0-9"
        if self.kind != "array" and self.array is not None:
            yield f"array {self.array} for a job of kind {self.kind}; take kind array"

    def _command_faults(self) -> Iterator[str]:
        """What the command has against the kind of job."""
        words, sweep = self.command, self.command[:2] == ("sweep", "run")
        if not words:
            yield "command is empty; give the words after deepdisc-ops, such as [train, small, --out, run]"
            return
        if self.kind == "nodes" and not sweep:
            yield f"kind nodes runs sweeps, found {' '.join(words[:2])}; begin with sweep run, or take kind ddp to train"
        if self.kind == "ddp" and words[0] != "train":
            yield f"kind ddp trains one network, found {words[0]}; begin with train"
        if self.kind == "nodes" and (given := _option(words, "--ray-address")):
            yield f"{given} is what the script finds out; leave it out"
        if self.kind == "array" and TASK not in (_value(words, "--out") or ""):
            yield f"every task of an array needs a folder of its own; give --out with {TASK}, as in --out folds/{TASK}"
        if self.kind != "array" and any(TASK in word for word in words):
            yield f"{TASK} means nothing for a job of kind {self.kind}; take kind array"
        if self.tracking is not None and not sweep:
            yield f"tracking is for sweeps, found {' '.join(words[:2])}; leave it out"
        if self.tracking is not None and (given := _option(words, "--tracking-uri")):
            yield f"the store is given by tracking and by {given}; give one of them"


def load_job(path: Path | None, overrides: tuple[str, ...] = (), command: tuple[str, ...] = ()) -> JobSettings:
    """A job from YAML, or from the shipped one of that name (node, nodes, array, ddp), with another command if one is given."""
    if path is not None and not path.exists() and str(path) in KINDS:
        path = find(f"tune/jobs/{path}.yaml")
    return _load(JobSettings, path, overrides, {"command": list(command)} if command else {})


def load_site(name: str | None, overrides: tuple[str, ...] = ()) -> SiteSettings:
    """A site by the name of its shipped profile or by its file; without a name a cluster that asks for nothing in particular."""
    path = None if name is None else Path(name)
    if path is not None and not path.exists():
        if name not in sites():
            raise ConfigError(f"no site {name!r} and no such file; there are {', '.join(sites())}, or give a YAML file")
        path = find(f"tune/sites/{name}.yaml")
    return _load(SiteSettings, path, overrides, {})


def sites() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in find("tune/sites").glob("*.yaml"))


def check(job: JobSettings, site: SiteSettings) -> None:
    """Raise ConfigError if the site cannot run the job, with all reasons."""
    faults = []
    if site.account_form and not (job.account or site.account):
        faults.append(f"jobs need an account, {site.account_form}; give account")
    if site.gpus_per_node is not None and job.gpus > site.gpus_per_node:
        faults.append(f"gpus is {job.gpus}, a node has {site.gpus_per_node}; take more nodes")
    cpus = job.cpus * job.tasks
    if site.cpus_per_node is not None and cpus > site.cpus_per_node:
        faults.append(f"cpus times tasks is {cpus}, a node has {site.cpus_per_node}; lower cpus")
    if site.longest and seconds(job.time) > seconds(site.longest):
        faults.append(f"time {job.time} is beyond the limit of {site.longest}; the job is queued again by itself, take less")
    if site.scratch is None and any(SCRATCH in word for word in job.command):
        faults.append(f"the command names {SCRATCH}, which the site does not tell; give scratch=PATH for the site")
    if faults:
        raise ConfigError(f"{site.name}: {'; '.join(faults)}")


def _load(schema: type[settings.S], path: Path | None, overrides: tuple[str, ...], rest: Mapping[str, Any]) -> settings.S:
    tree = settings.read_yaml(path) if path else {}
    for text in overrides:
        settings.set_by_path(tree, *settings.parse_override(text))
    return settings.validate(schema, {**tree, **rest}, str(path) if path else schema.__name__.removesuffix("Settings").lower())


def _option(words: tuple[str, ...], name: str) -> str | None:
    """The word that gives an option, as ``--name`` or ``--name=value``."""
    return next((word for word in words if word == name or word.startswith(f"{name}=")), None)


def _value(words: tuple[str, ...], name: str) -> str | None:
    """What an option is given, in either form."""
    for word, following in zip(words, (*words[1:], None), strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None
