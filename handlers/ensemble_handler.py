"""TorchServe's door to an ensemble: requests in the form of deepdisc_ops.serving.wire, one window each.

TorchServe loads this file by path from the archive. It accepts exactly one class in it and reports a failed import at
module level as a missing stock handler, so everything beyond the standard library is imported inside the methods.
"""

from __future__ import annotations

import logging
import os
import pathlib
import time
from typing import Any

log = logging.getLogger(__name__)


class EnsembleHandler:
    """One worker's ensemble; the members share the worker."""

    def initialize(self, ctx: Any) -> None:
        """Load and verify the members, then predict once on noise; raises when the archive cannot be served.

        A member that fails takes the others along, then and later, unless ensemble.yaml says ``on_failure: skip``.
        """
        import torch

        from deepdisc_ops.errors import ArchiveError
        from deepdisc_ops.inference.ensemble import Ensemble, read_description
        from deepdisc_ops.serving import archive

        started = time.monotonic()
        properties = ctx.system_properties
        if threads := os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(threads))
        gpu = properties.get("gpu_id")
        device = f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu"
        folder = pathlib.Path(properties["model_dir"])
        on_failure = read_description(folder).get("on_failure", "raise")
        if on_failure not in ("raise", "skip"):
            raise ArchiveError(f"on_failure is {on_failure!r} in {archive.DESCRIPTION}; expected raise or skip")
        self.ensemble = Ensemble.load(folder, device, on_failure=on_failure)
        self.version = archive.description_digest((folder / archive.DESCRIPTION).read_bytes())
        self._warm_up()
        seconds = time.monotonic() - started
        log.info("ensemble %s of %d members ready on %s in %.1f s", self.version, len(self.ensemble.members), device, seconds)

    def handle(self, data: list[dict[str, Any]], ctx: Any) -> list[bytes | str]:
        """One reply for each request of the batch; a refused request does not spoil its neighbours."""
        return [self._answer(request, index, ctx) for index, request in enumerate(data)]

    def _answer(self, request: dict[str, Any], index: int, ctx: Any) -> bytes | str:
        import torch

        from deepdisc_ops.errors import DeepdiscOpsError, InputError
        from deepdisc_ops.serving import wire

        try:
            reply = self._predict(request, ctx.get_all_request_header(index))
        except wire.Refused as refusal:
            status, fault = refusal.status, refusal.fault
        except InputError as error:
            status, fault = 422, wire.Fault("unusable", str(error), "")
        except DeepdiscOpsError as error:  # not the request's fault; it names the member
            log.exception("request %s failed", ctx.get_request_id(index))
            status, fault = 500, wire.Fault("member_failed", str(error), "")
        except (MemoryError, torch.OutOfMemoryError) as error:
            log.exception("request %s ran out of memory", ctx.get_request_id(index))
            who = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            what = f"the window does not fit in the worker's memory{who}"
            status, fault = 507, wire.Fault("out_of_memory", what, "send smaller windows")
        except Exception as error:  # TorchServe would answer 503, which clients retry
            log.exception("request %s failed", ctx.get_request_id(index))
            what = f"the worker failed with {type(error).__name__}: {error}"
            status, fault = 500, wire.Fault("internal", what, "see model_log.log of the server and report it")
        else:
            ctx.set_response_content_type(index, wire.REPLY_TYPE)
            return reply
        ctx.set_response_status(status, fault.code, index)
        ctx.set_response_content_type(index, wire.FAULT_TYPE)
        return wire.encode_fault(fault)

    def _predict(self, request: dict[str, Any], properties: dict[str, Any]) -> bytes:
        import deepdisc_ops
        from deepdisc_ops.serving import wire

        body = request.get("body", request.get("data"))
        if not isinstance(body, bytes | bytearray):
            raise wire.Refused("not_npy", "the request has no binary body", f"send the array as {wire.IMAGE_TYPE}")
        headers = {name.lower(): value for name, value in properties.items() if isinstance(value, str)}
        image = wire.decode_image(body, headers)
        planes = wire.order_planes(image.data, image.bands, self.ensemble.bands)
        found = self.ensemble.predict(planes, image.ebv, image.mask)
        return wire.encode_detections(found, model_version=self.version, package_version=deepdisc_ops.__version__)

    def _warm_up(self) -> None:
        import numpy as np

        from deepdisc_ops.sky.dust import EbvPlane

        noise = np.random.default_rng(0).normal(size=(len(self.ensemble.bands), 128, 128)).astype(np.float32)
        found = self.ensemble.predict(noise, EbvPlane.constant(0.0), np.zeros((128, 128), bool))
        if not np.isfinite(found.means).all():
            raise FloatingPointError("the ensemble predicts redshifts that are no numbers on noise; its weights are unusable")
