"""Makes `pages` importable by name, and the files that the how-tos speak of."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

sys.path.insert(0, str(Path(__file__).parent))
ROOT = Path(__file__).parents[2]
ZERO_POINT = 27.0
NJY_PER_COUNT = 10 ** (0.4 * (31.4 - ZERO_POINT))
PUBLISHED = {
    "model": {
        "bands": ["g", "r", "i"],
        "classes": ["galaxy", "star"],
        "pixel_scale": 0.2,
        "input": {"scaling": "zscore", "mean_njy": [0.0] * 3, "std_njy": [57.5] * 3},
        "backbone": {
            "name": "resnet18",
            "stem_stride": 4,
            "stem_pool": True,
            "levels": 4,
            "top_level": True,
            "fpn_channels": 16,
            "norm": "FrozenBN",
            "fpn_norm": "",
        },
        "anchor_sizes": [8, 16, 32, 64, 128],
        "proposals": {"aspect_ratios": [0.5, 1, 2], "anchor_offset": 0.0},
        "pooler": {"canonical_size": 224, "canonical_level": 4},
        "box_head": {"stages": 3, "hidden": [24, 24], "pool": 7},
        "mask_head": True,
        "redshift_head": {"hidden": [32, 16], "activation": "tanh", "pool": 7, "sigma_floor": 0, "components": 3},
    }
}
"""A network as DeepDISC has them, with the smallest ResNet and narrow heads."""


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a reader is supposed to have: the checkout's folders, coadds, cutouts, a catalogue, a checkpoint."""
    import deepdisc_ops as dd
    from deepdisc_ops.config import SkySettings
    from deepdisc_ops.data.simulate import simulate_scene, write_scene
    from deepdisc_ops.sky.catalog import write_catalog

    folder = tmp_path_factory.mktemp("reader")
    for name in ("models", "tune"):
        (folder / name).symlink_to(ROOT / name)
    lsst, hsc = folder / "mosaic.fits", folder / "hsc.fits"
    write_scene(simulate_scene(SkySettings(), size=192, seed=3), lsst)
    write_scene(simulate_scene(SkySettings(survey="hsc"), size=96, seed=3), hsc)
    _as_coadds(lsst, folder)
    with fits.open(lsst) as file:
        fits.HDUList([file[0], *(file[band] for band in "GRI")]).writeto(folder / "mosaic_gri.fits")
    _as_cutout(hsc, folder)
    _save_checkpoint(folder / "model_final.pth")
    write_catalog(dd.predict(lsst, folder / "models" / "lsst-small"), folder / "catalog.parquet")
    return folder


def _as_coadds(mosaic: Path, folder: Path) -> None:
    """A file a band as the LSST stack writes it: FLUXMAG0 and FILTER in the primary header, IMAGE, MASK, VARIANCE."""
    with fits.open(mosaic) as file:
        for band in "ugrizy":
            header = _wcs(file[band.upper()].header)
            image = (file[band.upper()].data / NJY_PER_COUNT).astype(np.float32)
            mask = fits.ImageHDU(np.zeros(image.shape, np.int32), header, name="MASK")
            mask.header["MP_BAD"], mask.header["HIERARCH MP_NO_DATA"] = 0, 8
            variance = fits.ImageHDU(np.full_like(image, np.median(np.abs(image)) ** 2 * 2.2), header, name="VARIANCE")
            primary = fits.PrimaryHDU(header=fits.Header({"FILTER": band, "FLUXMAG0": 10 ** (0.4 * ZERO_POINT)}))
            planes = [primary, fits.ImageHDU(image, header, name="IMAGE"), mask, variance]
            fits.HDUList(planes).writeto(folder / f"coadd_{band}.fits")


def _as_cutout(mosaic: Path, folder: Path) -> None:
    """A cube and an array in counts."""
    with fits.open(mosaic) as file:
        cube = np.stack([file[band].data for band in "GRIZY"]).astype(np.float32) / np.float32(NJY_PER_COUNT)
        fits.PrimaryHDU(cube, _wcs(file["G"].header)).writeto(folder / "cutout.fits")
    np.savez(folder / "cutout.npz", images=cube, bands=list("grizy"))


def _wcs(header: fits.Header) -> fits.Header:
    """The astrometry of a header and nothing of ours."""
    from astropy.wcs import WCS

    return WCS(header).to_header()


def _save_checkpoint(path: Path) -> None:
    import torch

    from deepdisc_ops.config import TrainingConfig, validate
    from deepdisc_ops.model.build import DeepDisc
    from deepdisc_ops.model.published import export_state

    config = validate(TrainingConfig, PUBLISHED, "test")
    torch.manual_seed(3)
    torch.save({"model": export_state(DeepDisc(config.model, config.inference))}, path)
