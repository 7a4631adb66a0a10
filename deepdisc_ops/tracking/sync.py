"""Bring the runs of one store into another: node-local records to a shared file or a server, as often as one likes.

A copy carries the tag `SOURCE_TAG` with the id of the run it came from at the very first, so that it is found again, also by way
of other stores, and a run that comes home is known there. Each copy also remembers, in the tag `MEMORY_TAG`, what was copied last:
a value that differs from the source and from what is remembered was changed by somebody else. It is kept, and told as a conflict.

Interrupted anywhere, a repetition ends the same. A run is created together with its `SOURCE_TAG`; metrics go over in the order of
their steps, each call wholly or not at all; tags and the memory of them change in one call; an artifact is marked before it is
copied; and that a run is complete is written last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepdisc_ops.errors import ConfigError
from deepdisc_ops.tracking import registry
from deepdisc_ops.tracking.artifacts import Artifacts
from deepdisc_ops.tracking.store import reported, sqlite_path
from deepdisc_ops.tracking.tracker import EXPERIMENT, METRICS_PER_CALL, PARAMS_PER_CALL, TAGS_PER_CALL, Tracker, batches

SOURCE_TAG = "deepdisc_ops.source_run"
"""The id a run had in the store it was recorded in."""
MEMORY_TAG = "mlflow.deepdisc_ops.sync"  # the prefix keeps it out of the UI
ALIASES_TAG = "deepdisc_ops.synced_aliases"
NAME_TAG = "mlflow.runName"

UNFINISHED = ""
"""The digest of an artifact that is being copied."""
TAG_LENGTH = 8000
"""MLflow's limit."""

Progress = Callable[[int, int], None]
Point = tuple[int, int, str]
"""Step, time and value of a metric as both stores will tell it: some databases keep fewer digits, and NaN equals nothing."""


@dataclass(frozen=True)
class SyncReport:
    """What a sync did: runs by what became of them, metric values, artifacts and registered versions that were copied.

    ``conflicts`` are one line each: what was kept in the target although the source says otherwise.
    """

    created: int
    updated: int
    unchanged: int
    values: int
    artifacts: int
    versions: int
    conflicts: tuple[str, ...]


@dataclass
class _Memory:
    """What a copy remembers of its source: digests of tags and artifacts, of the whole once it is complete, metrics in conflict."""

    fingerprint: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    disputed: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, run: Any) -> _Memory:
        tags = run.data.tags
        parts = itertools.takewhile(tags.__contains__, map(_memory_key, itertools.count()))
        text = "".join(tags[part] for part in parts)
        return cls(**json.JSONDecoder().raw_decode(text)[0]) if text else cls()  # a longer one may have left its end

    def as_tags(self) -> list[Any]:
        """As tags, which all have to be written in one call."""
        from mlflow.entities import RunTag

        text = json.dumps(dataclasses.asdict(self), separators=(",", ":"))
        return [RunTag(_memory_key(i), part) for i, part in enumerate(map("".join, batches(text, TAG_LENGTH)))]


def sync(source: str, target: str, *, experiment: str = EXPERIMENT, progress: Progress | None = None) -> SyncReport:
    """Copy what the store ``target`` lacks of the runs, artifacts and registered members of ``source``; both are store URIs.

    Raises ConfigError when a store cannot be used, TrainingError when one fails on the way: the same call goes on from there.
    """
    if source == target:
        raise ConfigError(f"{source} is named twice; expected the store to copy from and the one to copy to")
    with _alone(source):
        here = Tracker(source, experiment, create=False)
        return _Sync(here, Tracker(target, experiment)).run(progress)


class _Sync:
    """One pass over all runs."""

    def __init__(self, source: Tracker, target: Tracker) -> None:
        self._source, self._target = source, target
        self._count: Counter[str] = Counter()
        self._new: set[str] = set()
        self._conflicts: list[str] = []
        self._ids: dict[str, str] = {}

    def run(self, progress: Progress | None) -> SyncReport:
        with reported("list the runs of both stores"):
            runs = _all_runs(self._source, deleted=False)
            known: dict[str, list[Any]] = defaultdict(list)
            for run in _all_runs(self._target, deleted=True):
                known[_origin(run)].append(run)
        pairs = []
        for run in runs:
            copy = self._find_or_create(run, known[_origin(run)])
            if copy is not None:
                pairs.append((run, copy))
                self._ids[run.info.run_id] = copy.info.run_id
        for done, (run, copy) in enumerate(pairs):
            action = f"copy run {run.info.run_name} ({run.info.run_id})"
            with reported(action), tempfile.TemporaryDirectory(prefix="track-sync-") as scratch:
                self._bring_up(run, copy, Path(scratch))
            if progress:
                progress(done + 1, len(pairs))
        with reported("copy registered members"):
            self._register()
        counts = {key: self._count[key] for key in ("created", "updated", "unchanged", "values", "artifacts", "versions")}
        return SyncReport(**counts, conflicts=tuple(self._conflicts))

    def _find_or_create(self, run: Any, copies: list[Any]) -> Any | None:
        """The run in the target, bare when it is new; None if somebody deleted it there."""
        name, origin = run.info.run_name, _origin(run)
        living = sorted(
            (one for one in copies if one.info.lifecycle_stage == "active"), key=lambda one: (one.info.start_time, one.info.run_id)
        )
        if len(living) > 1:
            ids = ", ".join(one.info.run_id for one in living)
            self._conflicts.append(f"run {name}: {len(living)} copies of {origin} ({ids}); the first is used, delete the others")
        if copies and not living:
            self._conflicts.append(f"run {name}: its copy {copies[0].info.run_id} was deleted; restore it to have it synced again")
            return None
        if living:
            return living[0]
        with reported(f"create run {name}"):
            tags = {SOURCE_TAG: origin, **_kept(run.data.tags, ("mlflow.user", "mlflow.source.type", "mlflow.source.name"))}
            made = self._target.client.create_run(self._target.experiment_id, run.info.start_time, tags, name)
            self._new.add(made.info.run_id)
            return made

    def _bring_up(self, run: Any, copy: Any, scratch: Path) -> None:
        """Copy what the run in the target lacks."""
        run_id = copy.info.run_id
        here = Artifacts(self._source.client, self._source.uri, run, scratch)
        there = Artifacts(self._target.client, self._target.uri, copy, scratch)
        tags = {
            key: self._ids.get(value, value) for key, value in run.data.tags.items() if not key.startswith((SOURCE_TAG, MEMORY_TAG))
        }
        memory, fingerprint = _Memory.of(copy), _fingerprint(run, tags, here)
        fate = "unchanged"
        if memory.fingerprint != fingerprint:
            conflicts, memory.fingerprint = len(self._conflicts), ""
            written = [
                self._copy_tags(tags, copy, memory),
                self._copy_params(run, copy),
                self._copy_datasets(run, copy),
                self._copy_metrics(run, copy, memory),
                self._copy_artifacts(here, there, copy, memory),
                self._copy_status(run, copy),
            ]
            if len(self._conflicts) == conflicts:
                memory.fingerprint = fingerprint
            self._remember(run_id, memory)
            fate = "updated" if any(written) else fate
        self._count["created" if run_id in self._new else fate] += 1

    def _copy_tags(self, tags: Mapping[str, str], copy: Any, memory: _Memory) -> bool:
        from mlflow.entities import RunTag

        run_id, there, new = copy.info.run_id, copy.data.tags, {}
        for key, value in tags.items():
            if there.get(key) == value:
                memory.tags[key] = _digest(value)
            elif key in there and _digest(there[key]) != memory.tags.get(key):
                self._tell(copy, f"tag {key} is {there[key]!r}, the source says {value!r}")
            else:
                new[key] = value
        if NAME_TAG in new:
            self._target.client.update_run(run_id, name=new[NAME_TAG])
        for batch in batches(sorted(new), TAGS_PER_CALL // 2):
            memory.tags |= {key: _digest(new[key]) for key in batch}
            self._remember(run_id, memory, [RunTag(key, new[key]) for key in batch if key != NAME_TAG])
        return bool(new)

    def _copy_params(self, run: Any, copy: Any) -> bool:
        from mlflow.entities import Param

        there = copy.data.params
        for key, value in run.data.params.items():
            if there.get(key, value) != value:
                self._tell(copy, f"parameter {key} is {there[key]!r}, the source says {value!r}")
        new = [Param(key, value) for key, value in run.data.params.items() if key not in there]
        for batch in batches(new, PARAMS_PER_CALL):
            self._target.client.log_batch(copy.info.run_id, params=batch)
        return bool(new)

    def _copy_datasets(self, run: Any, copy: Any) -> bool:
        there = {(one.dataset.name, one.dataset.digest) for one in copy.inputs.dataset_inputs}
        new = [one for one in run.inputs.dataset_inputs if (one.dataset.name, one.dataset.digest) not in there]
        if new:
            self._target.client.log_inputs(copy.info.run_id, new)
        return bool(new)

    def _copy_metrics(self, run: Any, copy: Any, memory: _Memory) -> bool:
        """Copy the values that are missing, in the order of their steps; a metric with the same latest value is complete."""
        latest, there = _latest(run), _latest(copy)
        differing = [key for key in sorted(latest) if there.get(key) != latest[key] or key in memory.disputed]
        new, memory.disputed = [], []
        for key in differing:
            values = self._source.client.get_metric_history(run.info.run_id, key)
            known = self._target.client.get_metric_history(copy.info.run_id, key) if key in there else []
            mine, theirs = _by_step(values), _by_step(known)
            foreign = sorted(step for step in mine.keys() & theirs.keys() if theirs[step] - mine[step])
            if foreign:
                memory.disputed.append(key)
                self._tell(copy, f"metric {key} has other values at {len(foreign)} steps, the first of them {foreign[0]}")
            new += [one for one in values if one.step not in foreign and _point(one) not in theirs.get(one.step, ())]
        new.sort(key=lambda one: (one.step, one.timestamp))
        for batch in batches(new, METRICS_PER_CALL):
            self._target.client.log_batch(copy.info.run_id, metrics=batch)
            self._count["values"] += len(batch)
        return bool(new)

    def _copy_artifacts(self, here: Artifacts, there: Artifacts, copy: Any, memory: _Memory) -> bool:
        new = {}
        for entry, files in here.entries.items():
            mine = here.digests(entry, files)
            if mine.items() <= memory.artifacts.items():
                continue
            present = there.entries.get(entry, {}).keys() & mine.keys()
            theirs = there.digests(entry, [file for file in sorted(present) if memory.artifacts.get(file) != UNFINISHED])
            if any(digest not in (mine[file], memory.artifacts.get(file)) for file, digest in theirs.items()):
                self._tell(copy, f"artifact {entry} is another one there")
            elif theirs == mine:
                memory.artifacts |= mine
            else:
                new[entry] = mine
        if new:
            memory.artifacts |= {file: UNFINISHED for files in new.values() for file in files}
            self._remember(copy.info.run_id, memory)
        for entry, digests in new.items():
            there.put(entry, here.local(entry))
            memory.artifacts |= digests
            self._count["artifacts"] += 1
        return bool(new)

    def _copy_status(self, run: Any, copy: Any) -> bool:
        """A copy is as far as its source; a run that came home knows better itself."""
        home = SOURCE_TAG not in copy.data.tags
        if home or (run.info.status, run.info.end_time) == (copy.info.status, copy.info.end_time):
            return False
        if run.info.end_time is None or run.info.status == "RUNNING":
            self._target.client.update_run(copy.info.run_id, run.info.status)
        else:
            self._target.client.set_terminated(copy.info.run_id, run.info.status, run.info.end_time)
        return True

    def _register(self) -> None:
        """Register what is registered in the source, and point the aliases there too."""
        for model in registry.pages(self._source.client.search_registered_models):
            theirs = {one.version: one for one in self._target.registered(model.name)}
            aliases: dict[str, int] = {alias: one.version for one in theirs.values() for alias in one.aliases}
            for member in registry.members(self._source.client, model.name):
                run_id = self._ids.get(member.run_id)
                if run_id is None:
                    continue
                version = self._target.register(model.name, run_id).version
                self._count["versions"] += version not in theirs
                for alias in member.aliases:
                    self._point(model.name, alias, aliases.get(alias), version)

    def _point(self, model: str, alias: str, former: int | None, version: int) -> None:
        """Let an alias name a version unless somebody else let it name another one."""
        client = self._target.client
        if former not in (None, version):
            tags = client.get_model_version(model, str(former)).tags
            before = set(json.loads(tags.get(ALIASES_TAG, "[]")))
            if alias not in before:
                self._conflicts.append(f"model {model}: alias {alias} is at version {former}, the source says {version}")
                return
            client.set_model_version_tag(model, str(former), ALIASES_TAG, json.dumps(sorted(before - {alias})))
        now = set(json.loads(client.get_model_version(model, str(version)).tags.get(ALIASES_TAG, "[]")))
        if alias not in now:
            client.set_model_version_tag(model, str(version), ALIASES_TAG, json.dumps(sorted(now | {alias})))
        if former != version:
            client.set_registered_model_alias(model, alias, str(version))

    def _remember(self, run_id: str, memory: _Memory, tags: Sequence[Any] = ()) -> None:
        self._target.client.log_batch(run_id, tags=[*tags, *memory.as_tags()])

    def _tell(self, copy: Any, text: str) -> None:
        self._conflicts.append(f"run {copy.info.run_name} ({copy.info.run_id}): {text}")


@contextlib.contextmanager
def _alone(source: str) -> Iterator[None]:
    """Keep a second sync of the same file away: both would create what neither has found."""
    path = sqlite_path(source)
    with contextlib.ExitStack() as stack:
        if path and path.exists():
            try:
                lock = stack.enter_context(path.with_name(f".{path.name}.sync").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"another sync of {source} is at work; wait for its end") from error
            except OSError:  # a folder that may only be read, or a file system without locks
                pass
        yield


def _all_runs(tracker: Tracker, *, deleted: bool) -> list[Any]:
    """All runs of the experiment, oldest first: parents before their children."""
    from mlflow.entities import ViewType

    view = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY
    order = ["attributes.start_time ASC"]
    return list(registry.pages(tracker.client.search_runs, [tracker.experiment_id], run_view_type=view, order_by=order))


def _memory_key(part: int) -> str:
    return f"{MEMORY_TAG}.{part}" if part else MEMORY_TAG


def _origin(run: Any) -> str:
    return str(run.data.tags.get(SOURCE_TAG, run.info.run_id))


def _latest(run: Any) -> dict[str, Point]:
    """The latest point of every metric."""
    return {metric.key: _point(metric) for metric in run.data.to_proto().metrics}


def _point(metric: Any) -> Point:
    return metric.step, metric.timestamp, f"{metric.value:.12g}"


def _by_step(history: Iterable[Any]) -> dict[int, set[Point]]:
    points: dict[int, set[Point]] = defaultdict(set)
    for metric in history:
        points[metric.step].add(_point(metric))
    return dict(points)


def _fingerprint(run: Any, tags: Mapping[str, str], artifacts: Artifacts) -> str:
    """Of all that a sync would copy, without opening a file."""
    info, data = run.info, run.data
    datasets = sorted((one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs)
    listing = [(path, seen.size, seen.mtime_ns) for files in artifacts.entries.values() for path, seen in files.items()]
    parts = (info.status, info.end_time, sorted(tags.items()), sorted(data.params.items()), sorted(_latest(run).items()))
    return _digest(repr((*parts, datasets, listing)), 16)


def _digest(text: str, size: int = 4) -> str:
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


def _kept(tags: Mapping[str, str], keys: tuple[str, ...]) -> dict[str, str]:
    return {key: tags[key] for key in keys if key in tags}
