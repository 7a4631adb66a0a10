"""What Ray's actors of the tests build, imported by name there: the sky and the detector of `test_search`, with accidents."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from test_search import HEIGHT, WIDTH, local, sky

from deepdisc_ops.errors import ImageError
from deepdisc_ops.inference.recipe import EnsembleLooker
from deepdisc_ops.sky.detections import Detections
from deepdisc_ops.sky.dust import EbvPlane, ebv_source
from deepdisc_ops.sky.images import SkyImage


@dataclass(frozen=True)
class Accidents:
    """Builds a looker that leaves a file a window in ``folder``, and does ``what`` at windows whose pixels begin there.

    what: "kill" is SIGKILL, "once" the same unless it was done before, "fail" an error of the package, "bug" one that is none.
    """

    folder: Path
    what: Mapping[tuple[int, int], str] = field(default_factory=dict)
    pause_s: float = 0.0

    def looker(self) -> EnsembleLooker:
        def predict(image: SkyImage, ebv: EbvPlane) -> Detections:
            assert image.wcs is not None
            origin = round(WIDTH / 2 - image.wcs.wcs.crpix[0]), round(HEIGHT / 2 - image.wcs.wcs.crpix[1])
            (self.folder / f"{origin[0]}-{origin[1]}-{os.getpid()}-{time.time_ns()}").touch()
            time.sleep(self.pause_s)
            self._happen(self.what.get(origin, ""))
            return local(image, ebv)

        return EnsembleLooker(sky(), predict, ebv_source("0.03"), failures={"member-1": "it is a test"})

    def unbuildable(self) -> EnsembleLooker:
        raise ImageError("band u is missing: found g, expected u, g; add the file")

    def deadly(self) -> EnsembleLooker:
        os.kill(os.getpid(), signal.SIGKILL)
        return self.looker()

    def _happen(self, what: str) -> None:
        if what == "kill" or (what == "once" and not (self.folder / "killed").exists()):
            (self.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "fail":
            raise ImageError("the window was cut")
        if what == "bug":
            raise KeyError("bug")
