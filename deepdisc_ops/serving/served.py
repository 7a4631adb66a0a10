"""What the members behind an endpoint are, read from its archive where that can be seen from here."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

import yaml

from deepdisc_ops.errors import DeepdiscOpsError
from deepdisc_ops.inference.ensemble import DESCRIPTION
from deepdisc_ops.model.weights import MemberInfo, info_from_dict
from deepdisc_ops.serving.archive import description_digest
from deepdisc_ops.serving.endpoint import Address

log = logging.getLogger(__name__)


def served_members(addresses: list[Address]) -> list[MemberInfo]:
    """The members' descriptions; none where no archive of the version that is served lies where the endpoints say."""
    for address in addresses:
        if address.archive is None or address.model_version is None:
            continue
        try:
            return _members(address.archive, address.model_version)
        except (OSError, KeyError, TypeError, zipfile.BadZipFile, yaml.YAMLError, DeepdiscOpsError) as error:
            log.info("the archive %s of %s cannot be read from here (%s)", address.archive, address.url, error)
    return []


def _members(archive: Path, version: str) -> list[MemberInfo]:
    with zipfile.ZipFile(archive) as files:
        text = files.read(DESCRIPTION)
    if description_digest(text) != version:
        raise KeyError(f"{archive} is of another version than {version}")
    return [info_from_dict(member, f"{archive}, {member['name']}") for member in yaml.safe_load(text)["members"]]
