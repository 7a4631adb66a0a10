from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from deepdisc_ops.errors import ConfigError, TrainingError
from deepdisc_ops.tracking import Tracker, default_uri, store_uri
from deepdisc_ops.tracking.store import explain, sqlite_path

MakeStore = Callable[[str], str]


def set_revision(uri: str, revision: str) -> None:
    path = sqlite_path(uri)
    assert path is not None
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", (revision,))


@pytest.mark.parametrize(
    ("place", "uri"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:////a b/mlflow.db", "sqlite:////a b/mlflow.db"),
        ("/a b/sweep", "sqlite:////a b/sweep/mlflow.db"),
        ("/a b/other.db", "sqlite:////a b/other.db"),
    ],
)
def test_a_store_is_named_by_folder_file_or_uri(place: str, uri: str) -> None:
    assert store_uri(place) == uri


@pytest.mark.parametrize("uri", ["file:/tmp/mlruns", "sqlite:////proc/no/such/mlflow.db", "http://127.0.0.1:9"])
def test_a_store_that_cannot_be_used_is_named_with_the_remedy(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"expected sqlite:///PATH") as caught:
        Tracker(uri)
    assert uri in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_store_of_a_newer_or_an_older_mlflow_is_left_alone(make_store: MakeStore) -> None:
    uri = make_store("other version")
    set_revision(uri, "ffffffffffff")
    with pytest.raises(ConfigError, match=r"it is of a newer MLflow than the 3\.\S+ here: install that one, or name another store"):
        Tracker(uri)
    set_revision(uri, "451aebb31d03")
    with pytest.raises(ConfigError, match="it is of an older MLflow: copy it, then `mlflow db upgrade URI`"):
        Tracker(uri)


def test_a_read_only_store_is_read_and_refuses_writes_with_the_remedy(
    make_store: MakeStore, spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(spaced)  # MLflow makes a folder of the name of such an address there
    uri = make_store("to read")
    run = Tracker(uri).find_or_create("one", ("key", "value"))
    path = sqlite_path(uri)
    assert path is not None
    readable = Tracker(f"sqlite:///file:{path}?mode=ro&uri=true")
    assert readable.record(run).name == "one"
    with pytest.raises(TrainingError, match=r"readonly database \(it may only be read: record elsewhere and `track sync` it"):
        readable.find_or_create("two", ("key", "other"))


def test_a_file_that_is_no_store_is_named_at_once(spaced: Path) -> None:
    (spaced / "mlflow.db").write_text("a text that is longer than the header of a database, " * 20)
    with pytest.raises(ConfigError, match="file is not a database"):
        Tracker(default_uri(spaced))


def test_reading_makes_no_store(spaced: Path, migrated: Path) -> None:
    with pytest.raises(ConfigError, match="there is no"):
        Tracker(default_uri(spaced / "new"), create=False)
    assert not (spaced / "new").exists()
    shutil.copy(migrated, spaced / "mlflow.db")
    with pytest.raises(ConfigError, match="holds no experiment"):
        Tracker(default_uri(spaced), create=False)


def test_an_error_is_one_line_without_the_statement() -> None:
    error = OSError("(sqlite3.OperationalError) database is locked\n[SQL: INSERT INTO runs ...]")
    text = explain(error)
    assert "\n" not in text
    assert "INSERT" not in text
    assert "Lustre" in text
