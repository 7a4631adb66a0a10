"""A tracking store: its address, the way in, and its failures told in one line with what to do."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from deepdisc_ops.errors import ConfigError, TrainingError

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
"""Nothing is sent home or drawn, a server that went away is given up within seconds, the web interface starts no workers for
language models; what is set already stays."""
CHATTER = ("mlflow.store.db.utils", "mlflow.store.db", "alembic", "mlflow.store.model_registry.abstract_store")
SYMPTOMS = {
    r"readonly database|read-only file system": "it may only be read: record elsewhere and `track sync` it to where you may write",
    r"database is locked|disk i/o error|locking protocol": (
        "another program holds it, or its file system has no locks (Lustre, GPFS, NFS): "
        "record in a folder of the node's own disk and `track sync` it"
    ),
    r"no space left|disk is full": "the disk is full: make room and repeat",
    r"file is not a database": "expected the sqlite file of an MLflow store",
    r"max retries exceeded|connection|timed out|failed to establish": "no server answers there: start it, or wait, and repeat",
    r"\b40[13]\b|unauthorized|forbidden": "the server wants MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and _PASSWORD",
}
"""What the text of an error hints at, and what helps."""


def default_uri(out: Path) -> str:
    """The sqlite store of a results folder."""
    return f"sqlite:///{out.absolute() / 'mlflow.db'}"


def store_uri(place: str) -> str:
    """A store as a person names it: a URI as it is, an .db file, or a results folder."""
    if "://" in place or place.startswith("file:"):
        return place
    path = Path(place)
    return f"sqlite:///{path.absolute()}" if path.suffix in (".db", ".sqlite") else default_uri(path)


def ui_command(uri: str, port: int) -> list[str]:
    """Words after ``python -m`` that serve MLflow's web interface of a sqlite store on the loopback address."""
    words = ["mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return [*words, "--no-serve-artifacts", "--default-artifact-root", artifact_location(uri) or "."]


def sqlite_path(uri: str) -> Path | None:
    """The file of a sqlite store."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").removeprefix("file:").partition("?")[0])


def artifact_location(uri: str) -> str | None:
    """Artifacts lie beside a sqlite store; a server decides for itself."""
    path = sqlite_path(uri)
    return (path.absolute().parent / "artifacts").as_uri() if path else None


def connect(uri: str, *, create: bool = True) -> Any:
    """An MLflow client of a store that answers; a sqlite store is made and migrated, or with ``create=False`` must be there."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    path = sqlite_path(uri)
    try:
        if path:
            _prepare(path, create)
        from mlflow import MlflowClient

        for name in CHATTER:
            logging.getLogger(name).setLevel(logging.WARNING)
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except failures() as error:
        remedy = "expected sqlite:///PATH in a writable folder or the address of a running server"
        raise ConfigError(f"tracking store {uri} cannot be opened: {explain(error)}; {remedy}") from error
    return client


def _prepare(path: Path, create: bool) -> None:
    """See what is wrong with a file at once: MLflow would try it again for an hour."""
    if path.exists():
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            database.execute("SELECT name FROM sqlite_master LIMIT 1")
    elif create:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{path.parent} is a read-only file system or folder")
    else:
        raise FileNotFoundError(f"there is no {path}")


def failures() -> tuple[type[Exception], ...]:
    """What a store of whatever backend may raise."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, sqlite3.Error, OSError


@contextlib.contextmanager
def reported(action: str) -> Iterator[None]:
    """Turn failures of the store into one line that names the action."""
    try:
        yield
    except failures() as error:
        raise TrainingError(f"tracking could not {action}: {explain(error)}") from error


def explain(error: BaseException) -> str:
    """An error in one line, with what helps where that is known."""
    import mlflow

    text = " ".join(str(error).split()) or type(error).__name__
    found = re.search(r"found version (\w+)", text)
    if found:
        versions = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
        if any(versions.glob(f"{found[1]}_*.py")):
            return f"it is of an older MLflow: copy it, then `mlflow db upgrade URI` brings it to {mlflow.__version__}"
        return f"it is of a newer MLflow than the {mlflow.__version__} here: install that one, or name another store"
    remedy = next((help_ for symptom, help_ in SYMPTOMS.items() if re.search(symptom, text, re.IGNORECASE)), "")
    short = re.split(r" \[SQL:| failed with exception ", text, maxsplit=1)[0][:300]
    return f"{short} ({remedy})" if remedy else short


def local_artifacts(uri: str, run: Any) -> Path | None:
    """Folder of a run's artifacts where they lie on this machine, also after the folder of a sqlite store has moved."""
    root = urlsplit(run.info.artifact_uri)
    if root.scheme not in ("", "file"):
        return None
    folder, store = Path(unquote(root.path)), sqlite_path(uri)
    if not folder.exists() and store:
        moved = store.absolute().parent.joinpath("artifacts", *folder.parts[-2:])
        return moved if moved.exists() else folder
    return folder
