"""From a request to its reply: read, predicted, written, timed; every failure becomes a status and a reason.

The handler is TorchServe's door to this, and holds nothing that is not TorchServe's.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

import deepdisc_ops
from deepdisc_ops.errors import ConfigError, DeepdiscOpsError, InputError
from deepdisc_ops.serving.service import ServiceSettings
from deepdisc_ops.serving.wire.fault import Fault, Refused, encode_fault
from deepdisc_ops.serving.wire.image import Request, order_planes
from deepdisc_ops.serving.wire.options import request_name
from deepdisc_ops.serving.wire.protocol import EBV_HEADER, FAULT_TYPE, JSON_TYPE, REASONS, REPLY_TYPES, SERVER_EBV
from deepdisc_ops.serving.wire.reply import Origin
from deepdisc_ops.serving.wire.request import Model, decode_request, make_reader
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.dust import EbvPlane, Reddening, ebv_source, plane_over
from deepdisc_ops.sky.tiling import Window

if TYPE_CHECKING:
    from deepdisc_ops.inference.ensemble import Ensemble

DESCRIBE = "describe"
"""Header with which TorchServe asks for the customized metadata of the model."""

log = logging.getLogger(__name__)


@dataclass
class Answer:
    """What goes back, and what is told of it: the request's name, status, pixels in millions, objects, seconds by stage."""

    request: str = ""
    status: int = 200
    code: str = ""
    body: bytes | str = b""
    content_type: str = FAULT_TYPE
    objects: int = 0
    megapixels: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, also one that fails."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - begun

    def __str__(self) -> str:
        return f"{self.status} objects={self.objects} megapixels={self.megapixels:.3f} seconds={sum(self.seconds.values()):.3f}"


class Answerer:
    """Answers requests with an ensemble; for one thread. ``version`` is that of the archive."""

    def __init__(self, ensemble: Ensemble, version: str, service: ServiceSettings) -> None:
        self.ensemble, self.version, self.service = ensemble, version, service
        self._model = Model(tuple(ensemble.bands), ensemble.pixel_scale)
        self._reader = make_reader(self._model, service)
        self._dust: Reddening | None = None
        if service.dust_map is not None:
            self._dust = ebv_source(service.dust_map, service.dust_folder, service.dust_scale)

    def close(self) -> None:
        """End the process that reads files, if there is one."""
        self._reader.close()

    def answer(self, body: object, headers: Mapping[str, str], name: str) -> Answer:
        """The reply to a request; header names are lower-case. ``name`` is TorchServe's of it, for the log."""
        answer = Answer(uuid.uuid4().hex)
        if headers.get(DESCRIBE) == "True":
            answer.body, answer.content_type = json.dumps(self.describe()), JSON_TYPE
            return answer
        try:
            answer.request = request_name(headers) or answer.request
            self._fill(answer, body, headers)
        except Exception as error:
            fault = _fault(error)
            if REASONS[fault.code].status >= 500:
                log.exception("request %s %s failed", answer.request, name)
            answer.status, answer.code, answer.content_type = REASONS[fault.code].status, fault.code, FAULT_TYPE
            answer.body = encode_fault(replace(fault, request=answer.request))
        return answer

    def describe(self) -> dict[str, Any]:
        """What is served, in plain types."""
        ensemble = self.ensemble
        members = [
            {"name": seat.name, "weight": seat.weight, "left_out": ensemble.failures.get(seat.name)} for seat in ensemble.seats
        ]
        lost = {name: why for name, why in ensemble.failures.items() if name not in ensemble.names}
        return {
            "model_version": self.version,
            "package_version": deepdisc_ops.__version__,
            "bands": list(ensemble.bands),
            "pixel_scale": ensemble.pixel_scale,
            "members": [*members, *({"name": name, "weight": 0.0, "left_out": why} for name, why in lost.items())],
            "memory": self.service.memory,
            "max_window": self.service.max_window,
            "dust_map": None if self._dust is None else str(self._dust),
            "references": bool(self.service.roots),
        }

    def _fill(self, answer: Answer, body: object, headers: Mapping[str, str]) -> None:
        with answer.stage("read"):
            request = decode_request(body, headers, self._model, self.service, self._reader)
            planes = order_planes(request.data, request.bands, self.ensemble.bands)
            height, width = request.data.shape[1:]
            ebv = self._reddening(request, width, height)
        answer.megapixels = height * width / 1e6
        with answer.stage("predict"):
            found = self._predict(request, planes, ebv)
        answer.objects = len(found)
        with answer.stage("write"):
            from deepdisc_ops.serving.replies import encode_reply

            origin = Origin(answer.request, self.version, deepdisc_ops.__version__, dict(answer.seconds))
            answer.body = encode_reply(found, request, origin, self._model.bands, self.service.reply_bytes)
        answer.content_type = REPLY_TYPES[request.options.reply]

    def _reddening(self, request: Request, width: int, height: int) -> EbvPlane:
        if request.ebv is not None:
            return request.ebv
        lacking = "the server has no dust map" if self._dust is None else "the body has no WCS to ask the dust map with"
        if self._dust is None or request.wcs is None:
            raise Refused("no_dust_map", f"{EBV_HEADER} is {SERVER_EBV} and {lacking}", "give four numbers in mag")
        return plane_over(Window(0, 0, width, height), request.wcs, self._dust)

    def _predict(self, request: Request, planes: Any, ebv: EbvPlane) -> Detections:
        ensemble = self._chosen(request.options.members)
        try:
            if request.boxes is not None:
                return ensemble.redshift(planes, request.boxes, ebv, request.mask)
            if request.options.masks:
                self._check_masks(ensemble)
            found = ensemble.predict(planes, ebv, request.mask, masks=request.options.masks)
        finally:
            if ensemble is not self.ensemble:
                self.ensemble.failures.update(ensemble.failures)
        if (core := request.options.core) is None:
            return found
        x, y = ((found.boxes[:, :2] + found.boxes[:, 2:]) / 2).T
        return found.select(np.flatnonzero((x >= core[0]) & (x < core[2]) & (y >= core[1]) & (y < core[3])))

    def _check_masks(self, ensemble: Ensemble) -> None:
        """Refuse what a member cannot do before it counts as failed, and is perhaps left out for it."""
        without = [seat.name for seat in ensemble.seats if not seat.info.config.model.mask_head]
        if without:
            what = f"member {', '.join(without)[:200]} has no mask head"
            raise Refused("no_masks", what, "ask without masks, or for members that have one")

    def _chosen(self, names: tuple[str, ...]) -> Ensemble:
        """The ensemble, or some of its members."""
        if not names or set(names) == set(self.ensemble.names):
            return self.ensemble
        unknown = [name for name in names if name not in self.ensemble.names]
        if unknown:
            what = f"the ensemble has no member {', '.join(unknown)[:200]}"
            raise Refused("unknown_member", what, f"choose among {', '.join(self.ensemble.names)}")
        from deepdisc_ops.inference.ensemble import Ensemble

        whole = self.ensemble
        seats = [seat for seat in whole.seats if seat.name in names]
        failures = {name: why for name, why in whole.failures.items() if name in names}
        return Ensemble(
            seats,
            whole.settings,
            memory=self.service.memory,
            on_failure=whole.on_failure,
            failures=failures,
            calibration=whole.calibration,
        )


def _fault(error: Exception) -> Fault:
    """The reason that is answered for an error."""
    if isinstance(error, Refused):
        return error.fault
    from deepdisc_ops.inference.ensemble import ran_out_of_memory

    if ran_out_of_memory(error):
        who = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        return Fault("out_of_memory", f"the window does not fit in the worker's memory{who}", "send smaller windows")
    if isinstance(error, InputError):
        return Fault("unusable", str(error), "")
    if isinstance(error, ConfigError):
        return Fault("internal", str(error), "correct the server's settings and start it anew")
    if isinstance(error, DeepdiscOpsError):  # not the request's fault; it names the member
        return Fault("member_failed", str(error), "")
    what = f"the worker failed with {type(error).__name__}: {error}"
    return Fault("internal", what, "see model_log.log of the server and report it")
