"""The studies of both papers, as small trainings on a frozen sky: what is varied, and what the paper found.

A variant differs from the preset `small` in settings alone, or in the data set it learns from and is judged on. Where the question
allows it, every variant goes on from one trained member (`START`), the first of them too: as many steps then tell more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Sky = Literal["as_is", "one_year", "blurred"]
"""Data sets: the frozen sky, the same sky at 1 year of depth, and the same images blurred."""

BLUR_PIXELS = 2.5
"""Sigma of the Gaussian that blurs images. The JADES paper's kernel is "of 25 pixels", its width not defined; ours takes LSST's
PSF of 0.7 arcsec to one of 1.4."""


@dataclass(frozen=True)
class Variant:
    """One training: its settings beyond the preset's, and the data set."""

    label: str
    overrides: tuple[str, ...] = ()
    sky: Sky = "as_is"


@dataclass(frozen=True)
class Study:
    """Variants side by side, the first of them the preset as it is, or the first so many members of a published ensemble.

    tuned: every variant goes on from `START`, its first convolution without the bands the variant does not see. stars: judged with
    stars among the galaxies too, at redshift 0. ensembles: how many members there are in each that is judged. calibration: judged
    with a recalibration too. note: what the result does not tell.
    """

    title: str
    question: str
    paper: str
    variants: tuple[Variant, ...] = ()
    tuned: bool = False
    stars: bool = False
    ensembles: tuple[int, ...] = ()
    calibration: bool = False
    note: str = ""


MEMBERS = "models/lsst-ensemble"
"""The ensemble that studies of members ask, which they do not train."""

START = "models/lsst-small"
"""The ensemble of one member that the variants of a tuned study go on from, trained on all scenes, at 5 years, in all bands."""
TUNING = ("train.lr=0.0015",)

STUDIES: dict[str, Study] = {
    "depth": Study(
        "One year against five",
        "How much does depth matter, to the same network trained on the same sky?",
        "LSST paper: sigma_IQR 0.0756 after one year, 0.0363 after five, outliers 11.6 % and 9.7 %, on the objects common to both.",
        (Variant("5 years"), Variant("1 year", (), "one_year")),
        tuned=True,
    ),
    "size": Study(
        "Size of the training set",
        "What do a fifth and two fifths of the training scenes cost, with as many steps?",
        "The JADES paper compares training sets of one, two and five times the size; no figures of it are repeated here.",
        (
            Variant("all scenes"),
            Variant("two fifths", ("data.fraction=0.4",)),
            Variant("one fifth", ("data.fraction=0.2",)),
        ),
        note="So short a training draws 14 crops from each of the 400 scenes, 72 from each of the fifth's 80: what more scenes "
        "bring to one that lasts, it does not tell.",
    ),
    "blur": Study(
        "Blurred images",
        "How much of what the network knows is in the fine detail of the images, once it is trained on blurred ones?",
        'The JADES paper trains anew on images convolved with a Gaussian kernel "of 25 pixels", whose width it does not define.',
        (Variant("as seen"), Variant("blurred", (), "blurred")),
        tuned=True,
    ),
    "bands": Study(
        "Subsets of bands",
        "What does each band add?",
        "The JADES paper compares nine, six and four of NIRCam's bands; no figures of it are repeated here.",
        (
            Variant("ugrizy"),
            Variant("grizy", ("model.bands=[g, r, i, z, y]",)),
            Variant("griz", ("model.bands=[g, r, i, z]",)),
        ),
        tuned=True,
    ),
    "stars": Study(
        "Stars in the training of redshifts",
        "Should the redshift head learn from stars, at z = 0?",
        "LSST paper: z-pure, without stars, has sigma_IQR 0.0410 of galaxies alone and 0.0422 of a sample with stars, and "
        "11.8 and 12.8 % outliers; z-all has 0.0422 and 12.8 % of the latter.",
        (Variant("z-pure"), Variant("z-all", ("model.redshift_head.stars=z_all",))),
        tuned=True,
        stars=True,
    ),
    "ensemble": Study(
        "One, two, three members",
        "What do more members add?",
        "JADES paper: ten members give sigma_IQR 0.0311 and 5.0 % outliers, single ones 0.0356 to 0.0435 and 5.7 to 8.4 %.",
        ensembles=(1, 2, 3),
        note="The second and third member went on from the first: part of what they add is their further training. Of two members, "
        "what both find is kept, of three what two find.",
    ),
    "calibration": Study(
        "Calibration on and off",
        "Are the densities right, and what does recalibrating them on a split of their own do?",
        "LSST paper: a PIT KS of 0.0115 and a CDE loss of -4.249, nothing recalibrated that it tells of.",
        ensembles=(1, 3),
        calibration=True,
    ),
    "scaling": Study(
        "Scaling of the input",
        "Does it matter how pixels reach the network?",
        "JADES takes z-scores over the training pixels; the LSST paper does not state its scaling.",
        (
            Variant("arcsinh"),
            Variant("linear", ("model.input.scaling=linear",)),
            Variant("z-score", ("model.input.scaling=zscore",)),
        ),
        note="After so few steps a network that sees linear pixels finds hardly any faint galaxies: those that all found are "
        "the bright ones. Learning rate and score threshold were chosen with arcsinh.",
    ),
}
