"""TorchServe's management API, on loopback: states of the workers, length of the queue, new tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from deepdisc_ops.errors import ServerError
from deepdisc_ops.serving.wire import MODEL_NAME

TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Keys:
    """TorchServe's tokens, as it writes them into its key file; the one for the token API does not expire."""

    inference: str
    management: str
    renewal: str
    expires: str


@dataclass(frozen=True)
class Worker:
    """A worker: TorchServe's number for it, its process, and READY when it can predict."""

    number: str
    pid: int
    state: str
    memory_bytes: int


@dataclass(frozen=True)
class ModelStatus:
    """Workers of the model, and how many requests wait for one; ``denied``: the token is worthless, and nothing is known."""

    workers: tuple[Worker, ...]
    pending: int
    denied: bool = False

    @property
    def ready(self) -> int:
        """How many workers can predict."""
        return sum(worker.state == "READY" for worker in self.workers)


def read_keys(path: Path) -> Keys:
    """The tokens in a key file; OSError or ValueError while it is not there or half written."""
    tree = json.loads(path.read_text())
    try:
        inference, management, renewal = (tree[kind] for kind in ("inference", "management", "API"))
        return Keys(inference["key"], management["key"], renewal["key"], inference["expiration time"])
    except (KeyError, TypeError):
        raise ValueError(f"{path} lacks a key") from None


def model_status(url: str, token: str) -> ModelStatus:
    """Ask the management address ``url``; no workers while the model is being loaded. Raises httpx.HTTPError."""
    reply = httpx.get(f"{url}/models/{MODEL_NAME}", headers=_bearer(token), timeout=TIMEOUT_S, trust_env=False)
    if reply.status_code != httpx.codes.OK:
        return ModelStatus((), 0, denied=reply.status_code in (400, 401, 403))
    models: list[dict[str, Any]] = reply.json()
    workers = tuple(
        Worker(str(worker["id"]), int(worker["pid"]), str(worker["status"]), int(worker.get("memoryUsage", 0)))
        for model in models
        for worker in model["workers"]
    )
    return ModelStatus(workers, sum(int(model.get("jobQueueStatus", {}).get("pendingRequests", 0)) for model in models))


def renew_token(url: str, renewal: str, kind: str) -> None:
    """Have TorchServe make a new token of ``kind``, inference or management; the old one counts no more."""
    try:
        reply = httpx.get(f"{url}/token", params={"type": kind}, headers=_bearer(renewal), timeout=TIMEOUT_S, trust_env=False)
    except httpx.HTTPError as error:
        raise ServerError(f"{url} gave no new {kind} token ({type(error).__name__}); it is tried again") from None
    if reply.status_code != httpx.codes.OK or "Error" in reply.text:
        said = " ".join(reply.text.split())[:200]
        raise ServerError(f"{url} gave no new {kind} token ({reply.status_code} {said}); it is tried again")


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}
