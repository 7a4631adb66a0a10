"""The domain of a training set: what its images are like, to be kept with the members that learn from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepdisc_ops.config import AugmentSettings
from deepdisc_ops.data.pixels import read_pixels
from deepdisc_ops.data.records import Record
from deepdisc_ops.sky.domain import Domain, measure_image

MEASURED_IMAGES = 64
"""The domain is measured on this many images, spread evenly over the training set."""


def training_domain(
    records: Sequence[Record], bands: Sequence[str], augment: AugmentSettings | None = None, images: int = MEASURED_IMAGES
) -> Domain:
    """The domain of at most ``images`` records in ``bands``, and of what ``augment`` makes of them.

    Raises what reading them raises. Dropped bands are no part of it: a band that is missing is known to be.
    """
    spread = np.unique(np.linspace(0, len(records) - 1, min(images, len(records))).round().astype(int))
    measured, scales = [], []
    for i in spread:
        image = read_pixels(records[int(i)], bands, with_wcs=False)
        measured.append(measure_image(image))
        scales.append(image.pixel_scale)
    domain = Domain.of(measured, tuple(bands), float(np.median(scales)))
    return domain if augment is None else domain.augmented(augment.noise_factor[1], augment.blur_px[1])
