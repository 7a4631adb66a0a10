"""Members in MLflow's model registry: one version for every run, found again by aliases such as champion or member-0."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deepdisc_ops.errors import ConfigError

RESERVED_ALIAS = re.compile(r"latest|v\d+", re.IGNORECASE)
"""What MLflow keeps for itself: ``models:/NAME@v1`` would be ambiguous."""


@dataclass(frozen=True)
class RegisteredMember:
    """A version of a registered model; ``source`` is the URI of the checkpoint's folder."""

    name: str
    version: int
    run_id: str
    source: str
    aliases: tuple[str, ...]


def check_names(name: str, aliases: Sequence[str]) -> None:
    """Raise ConfigError for a model name or an alias that MLflow would refuse."""
    if not name or re.search("[/:]", name):
        raise ConfigError(f"model name {name!r} is not allowed; expected one without / and :")
    for alias in aliases:
        if RESERVED_ALIAS.fullmatch(alias):
            raise ConfigError(f"alias {alias!r} is reserved by MLflow; take another, such as champion or member-0")
        if not re.fullmatch(r"[\w-]+", alias, re.ASCII):
            raise ConfigError(f"alias {alias!r} is not allowed; expected letters, digits, _ and -")


def find_or_create_version(client: Any, name: str, run_id: str, source: str) -> int:
    """The version of ``name`` that holds the checkpoint of a run, made if there is none."""
    if not client.search_registered_models(f"name = {quoted(name)}"):
        client.create_registered_model(name)
    for version in versions(client, name):
        if version.run_id == run_id:
            return int(version.version)
    return int(client.create_model_version(name, source, run_id).version)


def members(client: Any, name: str) -> list[RegisteredMember]:
    """All versions of a model, oldest first; none for a name that is not registered."""
    if not client.search_registered_models(f"name = {quoted(name)}"):
        return []
    aliases: dict[str, str] = client.get_registered_model(name).aliases
    return [
        RegisteredMember(
            name,
            int(one.version),
            one.run_id,
            one.source,
            tuple(sorted(a for a, v in aliases.items() if int(v) == int(one.version))),
        )
        for one in versions(client, name)
    ]


def versions(client: Any, name: str) -> list[Any]:
    """MLflow's own entries of a model's versions, oldest first."""
    return sorted(pages(client.search_model_versions, f"name = {quoted(name)}"), key=lambda one: int(one.version))


def pages(search: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
    """All entries of a search that MLflow answers page by page."""
    token = None
    while True:
        page = search(*arguments, page_token=token, **options)
        yield from page
        token = page.token
        if not token:
            return


def quoted(text: str) -> str:
    """A value in one of MLflow's filters, which know no escapes."""
    return f'"{text}"' if "'" in text else f"'{text}'"
