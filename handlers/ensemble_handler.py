"""TorchServe's door to an ensemble: requests in the form of deepdisc_ops.serving.wire, one window each.

TorchServe loads this file by path from the archive. It accepts exactly one class in it and reports a failed import at
module level as a missing stock handler, so everything beyond the standard library is imported inside the methods.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)


class EnsembleHandler:
    """One worker's ensemble; the members share the worker."""

    def initialize(self, ctx: Any) -> None:
        """Load and verify the members, ask the canary, predict once on noise; raises when the archive cannot be served.

        A member that fails takes the others along, then and later, unless ensemble.yaml says ``on_failure: skip``.
        """
        import torch

        import deepdisc_ops
        from deepdisc_ops.errors import ArchiveError
        from deepdisc_ops.inference.ensemble import Ensemble, read_description
        from deepdisc_ops.serving import archive, canary, contents
        from deepdisc_ops.serving.answering import Answerer
        from deepdisc_ops.serving.metrics import Metrics
        from deepdisc_ops.serving.service import read_service

        started = time.monotonic()
        service = read_service()
        if threads := os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(threads))
        gpu = ctx.system_properties.get("gpu_id")
        device = f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu"
        folder = pathlib.Path(ctx.system_properties["model_dir"])
        description = read_description(folder)
        archive.check_version(description)
        contents.check_files(folder)
        on_failure = description.get("on_failure", "raise")
        if on_failure not in ("raise", "skip"):
            raise ArchiveError(f"on_failure is {on_failure!r} in {archive.DESCRIPTION}; expected raise or skip")
        self.ensemble = Ensemble.load(folder, device, memory=service.memory, on_failure=on_failure)
        version = archive.description_digest((folder / archive.DESCRIPTION).read_bytes())
        self.answerer = Answerer(self.ensemble, version, service)
        canary.check(self.ensemble, folder)
        self._warm_up()
        members = len(self.ensemble.names) - len(self.ensemble.failures.keys() & set(self.ensemble.names))
        metrics = Metrics(getattr(ctx, "metrics", None))
        metrics.ready(version=version, package=deepdisc_ops.__version__, members=members)
        metrics.members(members, len(self.ensemble.failures))
        seconds = time.monotonic() - started
        log.info("ensemble %s of %d members ready on %s in %.1f s", version, members, device, seconds)

    def handle(self, data: list[dict[str, Any]], ctx: Any) -> list[bytes | str]:
        """One reply for each request of the batch; a refused request does not spoil its neighbours."""
        with self._at_work():
            return [self._answer(request, index, ctx) for index, request in enumerate(data)]

    def _answer(self, request: dict[str, Any], index: int, ctx: Any) -> bytes | str:
        from deepdisc_ops.serving.metrics import Metrics
        from deepdisc_ops.serving.wire import REQUEST_HEADER

        properties = ctx.get_all_request_header(index)
        headers = {name.lower(): value for name, value in properties.items() if isinstance(value, str)}
        name = ctx.get_request_id(index)
        answer = self.answerer.answer(request.get("body", request.get("data")), headers, name)
        if answer.status != 200:
            ctx.set_response_status(answer.status, answer.code, index)
        ctx.set_response_content_type(index, answer.content_type)
        ctx.set_response_header(index, REQUEST_HEADER, answer.request)
        log.info("request %s %s %s", answer.request, name, answer)
        metrics = Metrics(ctx.metrics)
        metrics.request(status=answer.status, objects=answer.objects, megapixels=answer.megapixels, seconds=answer.seconds)
        if failures := self.answerer.ensemble.failures:
            names = set(self.answerer.ensemble.names)
            metrics.members(len(names - failures.keys()), len(failures))
        return answer.body

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Keep a file of the worker's number where the server looks for those that have not answered yet."""
        folder = self.answerer.service.busy
        if folder is None:
            yield
            return
        mark = folder / str(os.getpid())
        try:
            mark.touch()
        except OSError as error:  # a full disk is no reason not to answer
            log.warning("%s cannot be made (%s): the server may be ended while it answers", mark, error)
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)

    def _warm_up(self) -> None:
        import numpy as np

        from deepdisc_ops.sky.dust import EbvPlane

        noise = np.random.default_rng(0).normal(size=(len(self.ensemble.bands), 128, 128)).astype(np.float32)
        found = self.ensemble.predict(noise, EbvPlane.constant(0.0), np.zeros((128, 128), bool))
        if not np.isfinite(found.means).all():
            raise FloatingPointError("the ensemble predicts redshifts that are no numbers on noise; its weights are unusable")
