from __future__ import annotations

import fcntl
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from deepdisc_ops.errors import ConfigError, TrainingError
from deepdisc_ops.tracking import (
    CHECKPOINT_FOLDER,
    KIND_TAG,
    PARENT_TAG,
    SOURCE_TAG,
    STATE_TAG,
    TRIAL_TAG,
    Measurement,
    Tracker,
    default_uri,
    sync,
    tracker,
)

MakeStore = Callable[[str], str]
START_S = 300
WRITES = ("create_", "log_", "set_", "update_", "delete_")


def rows(*steps: int) -> list[Measurement]:
    return [
        Measurement(step, 1.7e9 + step, {"val_nll": 1 / step, "lr": 1e-3, "odd": [math.nan, math.inf, -1.5][step % 3]})
        for step in steps
    ]


def write_checkpoint(folder: Path, text: str) -> Path:
    (folder / "best" / "deep").mkdir(parents=True, exist_ok=True)
    (folder / "best" / "member.yaml").write_text(text)
    (folder / "best" / "deep" / "weights").write_bytes(bytes(1000))
    return folder / "best"


def record(store: Tracker, folder: Path, *, steps: int = 40, trials: tuple[str, ...] = ("t_0", "t_1")) -> None:
    """A sweep whose trials came to ``steps``; calling it again goes on."""
    parent = store.find_or_create("sweep", ("deepdisc_ops.sweep", "s-1"), tags={KIND_TAG: "sweep"})
    store.log_params(parent, {"seed": "0"})
    for trial in trials:
        run = store.find_or_create(f"sweep-{trial}", (TRIAL_TAG, trial), parent=parent, tags={"backbone": "tiny"})
        store.log_params(run, {f"p{i}": str(i) for i in range(130)})
        store.log_dataset(run, "scenes", "abc", folder, 0.2)
        store.log_measurements(run, rows(*range(10, steps + 1, 10)))
        store.log_summary(run, steps, {"best_val_nll": 1 / steps})
        store.log_artifact(run, write_checkpoint(folder, f"step: {steps}, trial: {trial}"), CHECKPOINT_FOLDER)
        (folder / "loss.png").write_bytes(b"figure of %d" % steps)
        store.log_artifact(run, folder / "loss.png")
        store.set_tags(run, {STATE_TAG: "finished" if steps == 40 else "running", **{f"tag{i}": str(steps + i) for i in range(60)}})
        if steps == 40:
            store.end(run)
    store.set_tags(parent, {"best_run_id": run})
    if steps == 40:
        store.end(parent)
        store.register("lsst", run, ("champion", "member-0"))


def picture(store: Tracker, scratch: Path = Path("unused")) -> dict[str, Any]:
    """All that a store holds, with runs by their names instead of their ids; a server's artifacts are copied to ``scratch``."""
    runs = store.runs({})
    names = {run.run_id: run.name for run in runs}
    assert len(set(names.values())) == len(names)
    return {run.name: picture_of(store, run.run_id, names, scratch) for run in runs} | {
        "registered": [(one.version, names[one.run_id], one.aliases) for one in store.registered("lsst")]
    }


def picture_of(store: Tracker, run_id: str, names: dict[str, str], scratch: Path) -> dict[str, Any]:
    run = store.client.get_run(run_id)
    tags = {key: names.get(value, value) for key, value in run.data.tags.items() if "sync" not in key and key != SOURCE_TAG}
    histories = {key: store.client.get_metric_history(run_id, key) for key in run.data.metrics}
    root = store.fetch(run_id, "", scratch / names[run_id])
    return {
        "times": (run.info.start_time, run.info.end_time),
        "status": run.info.status,
        "tags": tags,
        "params": run.data.params,
        "metrics": {key: sorted((m.step, m.timestamp, str(m.value)) for m in history) for key, history in histories.items()},
        "datasets": [(d.dataset.to_dictionary(), [(t.key, t.value) for t in d.tags]) for d in run.inputs.dataset_inputs],
        "artifacts": {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()},
    }


@pytest.fixture
def source(make_store: MakeStore, spaced: Path) -> Tracker:
    store = Tracker(make_store("node"))
    record(store, spaced)
    return store


@pytest.fixture
def target(make_store: MakeStore) -> str:
    return make_store("shared")


def child(store: Tracker, trial: str = "t_0") -> str:
    (run,) = store.runs({TRIAL_TAG: trial})
    return run.run_id


def test_a_copy_is_the_sweep_and_a_second_one_adds_nothing(source: Tracker, target: str) -> None:
    first = sync(source.uri, target)
    assert (first.created, first.updated, first.unchanged, first.versions, first.conflicts) == (3, 0, 0, 1, ())
    there = Tracker(target)
    assert picture(there) == picture(source)
    assert len(picture(there)["sweep-t_0"]["artifacts"]) == 3
    copies = there.runs({})
    assert {run.tags[SOURCE_TAG] for run in copies} == {run.run_id for run in source.runs({})}
    (parent,) = there.runs({KIND_TAG: "sweep"})
    assert {run.tags[PARENT_TAG] for run in there.children(parent.run_id)} == {parent.run_id}
    assert parent.tags["best_run_id"] in {run.run_id for run in copies}
    second = sync(source.uri, target)
    assert (second.created, second.updated, second.unchanged) == (0, 0, 3)
    assert second.values == second.artifacts == second.versions == 0
    assert picture(there) == picture(source)


def test_only_what_is_new_is_copied(make_store: MakeStore, spaced: Path, target: str) -> None:
    source = Tracker(make_store("node"))
    record(source, spaced, steps=20)
    assert sync(source.uri, target).values == 2 * (2 * 3 + 1)
    assert {run.status for run in Tracker(target).runs({})} == {"RUNNING"}
    record(source, spaced, steps=40)
    report = sync(source.uri, target)
    assert (report.created, report.updated, report.values, report.conflicts) == (0, 3, 2 * (2 * 3 + 1), ())
    assert picture(Tracker(target)) == picture(source)
    source.log_artifact(child(source), write_checkpoint(spaced, "put there alone"), CHECKPOINT_FOLDER)
    report = sync(source.uri, target)
    assert (report.updated, report.artifacts, report.conflicts) == (1, 1, ())
    assert picture(Tracker(target)) == picture(source)


class Faulty:
    """A client whose writing fails at the given call, before it or after it was done."""

    def __init__(self, client: Any, fails_at: int, *, after: bool) -> None:
        self._client, self._left, self._after = client, fails_at, after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return (lambda *args, **kwargs: self._write(method, name, *args, **kwargs)) if name.startswith(WRITES) else method

    def _write(self, method: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        self._left -= 1
        if self._left == 0 and not self._after:
            if name == "log_artifacts":
                method(*args, **kwargs)
                for path in self._written(*args):
                    path.write_bytes(path.read_bytes()[:3])
            raise ConnectionError("connection reset")
        result = method(*args, **kwargs)
        if self._left == 0:
            raise ConnectionError("connection reset")
        return result

    def _written(self, run_id: str, _local: str, folder: str) -> list[Path]:
        """What a copy that broke off has left."""
        root = Path(self._client.get_run(run_id).info.artifact_uri.removeprefix("file://").replace("%20", " "))
        return [path for path in (root / folder).rglob("*") if path.is_file()]


@pytest.mark.parametrize("after", [False, True])
def test_interrupted_anywhere_and_repeated_it_ends_the_same(
    after: bool, make_store: MakeStore, spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stages of a sweep are synced; the sync of each breaks off at its n-th write."""
    source = Tracker(make_store("early"))
    record(source, spaced, steps=20, trials=("t_0",))
    shutil.copytree(spaced / "early", spaced / "late")
    source = Tracker(default_uri(spaced / "late"))
    record(source, spaced, steps=40, trials=("t_0",))
    expected, connect, failures = picture(source), tracker.connect, 0

    for fails_at in (1, 2, 4, 5, 7, 9, 12, 15):
        target = make_store(f"shared {fails_at}")

        def faulty(uri: str, *, create: bool = True, target: str = target, fails_at: int = fails_at) -> Any:
            client = connect(uri, create=create)
            return Faulty(client, fails_at, after=after) if uri == target else client

        monkeypatch.setattr(tracker, "connect", faulty)
        for stage in ("early", "late"):
            try:
                sync(default_uri(spaced / stage), target)
            except TrainingError as error:
                failures += "connection reset" in str(error)
        monkeypatch.setattr(tracker, "connect", connect)
        assert sync(source.uri, target).conflicts == ()
        assert picture(Tracker(target)) == expected
    assert failures >= 14


def test_what_others_changed_is_kept_and_told_each_time(source: Tracker, target: str, spaced: Path) -> None:
    sync(source.uri, target)
    there, mine = Tracker(target), child(source)
    copy = child(there)
    there.set_tags(copy, {"note": "mine", "tag1": "changed here"})
    there.client.log_batch(copy, metrics=[metric("val_nll", 7.0, 50)])
    there.client.log_param(copy, "extra", "here")
    (spaced / "loss.png").write_bytes(b"drawn by hand")
    there.log_artifact(copy, spaced / "loss.png")
    there.register("lsst", copy, ("champion",))

    source.set_tags(mine, {"tag1": "changed there", "note": "other"})
    source.log_measurements(mine, [Measurement(50, 1.8e9, {"val_nll": 0.01}), Measurement(60, 1.8e9, {"val_nll": 0.02})])
    source.log_params(mine, {"extra": "there"})
    (spaced / "loss.png").write_bytes(b"figure of 60")
    source.log_artifact(mine, spaced / "loss.png")

    report = sync(source.uri, target)
    told = "\n".join(report.conflicts)
    assert "tag tag1 is 'changed here', the source says 'changed there'" in told
    assert "tag note is 'mine', the source says 'other'" in told
    assert "parameter extra is 'here', the source says 'there'" in told
    assert "metric val_nll has other values at 1 steps, the first of them 50" in told
    assert "artifact loss.png is another one there" in told
    assert "model lsst: alias champion is at version 2, the source says 1" in told
    assert len(report.conflicts) == 6
    assert there.history(copy, "val_nll")[-2:] == [(50, 7.0), (60, 0.02)]
    assert there.record(copy).tags["tag1"] == "changed here"
    assert (there.fetch(copy, "loss.png", spaced)).read_bytes() == b"drawn by hand"
    assert sync(source.uri, target).conflicts == report.conflicts


def metric(key: str, value: float, step: int) -> Any:
    from mlflow.entities import Metric

    return Metric(key, value, 1_700_000_000_000, step)


def test_an_alias_follows_the_source(source: Tracker, target: str) -> None:
    sync(source.uri, target)
    source.register("lsst", child(source, "t_0"), ("champion",))
    assert sync(source.uri, target).conflicts == ()
    there = Tracker(target)
    assert picture(there) == picture(source)
    assert [one.aliases for one in there.registered("lsst")] == [("member-0",), ("champion",)]
    there.register("lsst", child(there, "t_1"), ("champion",))
    assert len(sync(source.uri, target).conflicts) == 1


def test_a_copy_that_was_deleted_does_not_come_back(source: Tracker, target: str) -> None:
    sync(source.uri, target)
    there = Tracker(target)
    there.client.delete_run(child(there))
    (told,) = sync(source.uri, target).conflicts
    assert "was deleted; restore it" in told
    assert len(there.runs({})) == 2


def test_by_any_way_a_run_arrives_once(source: Tracker, target: str, make_store: MakeStore) -> None:
    third = make_store("third")
    sync(source.uri, target)
    sync(target, third)
    assert sync(source.uri, third).created == 0
    Tracker(target).set_tags(child(Tracker(target)), {"note": "looked at"})
    before = picture(source)
    assert sync(target, source.uri).created == 0
    before["sweep-t_0"]["tags"]["note"] = "looked at"
    assert picture(source) == before
    assert sync(source.uri, target).conflicts == ()
    assert picture(Tracker(target)) == picture(source)


def test_a_run_that_comes_home_keeps_its_state(source: Tracker, target: str) -> None:
    sync(source.uri, target)
    run = source.find_or_create("sweep-t_0", (TRIAL_TAG, "t_0"))
    sync(target, source.uri)
    assert source.record(run).status == "RUNNING"


def test_a_store_whose_folder_moved_is_copied(source: Tracker, target: str, spaced: Path) -> None:
    expected = picture(source)
    (spaced / "node").rename(spaced / "moved")
    sync(default_uri(spaced / "moved"), target)
    assert picture(Tracker(target)) == expected


def test_one_sync_of_a_store_at_a_time(source: Tracker, target: str, spaced: Path) -> None:
    with (spaced / "node" / ".mlflow.db.sync").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another sync of .* is at work"):
            sync(source.uri, target)
    assert sync(source.uri, target).created == 3


def test_copies_made_twice_are_told(source: Tracker, target: str) -> None:
    there = Tracker(target)
    for _ in range(2):
        there.client.create_run(there.experiment_id, tags={SOURCE_TAG: child(source)}, run_name="sweep-t_0")
    (told,) = sync(source.uri, target).conflicts
    assert "2 copies of" in told


@contextmanager
def server(folder: Path, port: int) -> Iterator[tuple[str, subprocess.Popen]]:
    """MLflow's own server, with artifacts through it."""
    words = ["server", "--backend-store-uri", default_uri(folder), "--artifacts-destination", str(folder / "kept")]
    command = [sys.executable, "-m", "mlflow", *words, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + START_S
            while not answers(port):
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}", process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def answers(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10):
        return True
    return False


@pytest.mark.integration
def test_a_server_that_dies_midway_gets_the_rest_later(
    source: Tracker, make_store: MakeStore, spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    make_store("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with server(spaced / "server", port) as (uri, process):
        with pytest.raises(TrainingError, match="tracking could not copy run .*no server answers there") as caught:
            sync(source.uri, uri, progress=lambda done, total: os.killpg(process.pid, signal.SIGKILL))
        assert "\n" not in str(caught.value)
        process.wait()
        with pytest.raises(ConfigError, match="no server answers there"):
            sync(source.uri, uri)
    with server(spaced / "server", port) as (uri, _):
        report = sync(source.uri, uri)
        assert (report.created, report.unchanged, report.conflicts) == (0, 1, ())
        assert picture(Tracker(uri), spaced / "fetched") == picture(source)
        again = sync(source.uri, uri)
        assert (again.updated, again.unchanged, again.conflicts) == (0, 3, ())


def test_a_store_without_sweeps_is_named(make_store: MakeStore, spaced: Path, target: str) -> None:
    with pytest.raises(ConfigError, match="there is no .*mlflow.db"):
        sync(default_uri(spaced / "nowhere"), target)
    assert not (spaced / "nowhere").exists()
    with pytest.raises(ConfigError, match="holds no experiment deepdisc_ops; name the store of a sweep"):
        sync(make_store("empty"), target)
    with pytest.raises(ConfigError, match="is named twice"):
        sync(target, target)
