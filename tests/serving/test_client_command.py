"""The words of `predict` about endpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from scripted import ScriptedEndpoint, answer, catalogue, objects

from deepdisc_ops import cli
from deepdisc_ops.cli.eyes import server_list
from deepdisc_ops.errors import AccessDenied, ConfigError
from deepdisc_ops.serving import wire
from deepdisc_ops.sky.catalog import read_catalog

SIDE = 300


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    """Finds one object in the middle of every window."""

    def usual(asked: object) -> object:
        _, headers, body = asked  # type: ignore[misc]  # as it was sent
        height, width = wire.decode_image(body, headers).data.shape[1:]
        x, y = width / 2, height / 2
        return answer(200, catalogue(objects([(x - 4, y - 4, x + 4, y + 4)])))

    end = ScriptedEndpoint(usual, token="secret")
    yield end
    end.stop()


@pytest.fixture
def sky(spaced: Path) -> Path:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.cdelt, wcs.wcs.crpix = ["RA---TAN", "DEC--TAN"], [150, 2], [-5e-5, 5e-5], [150, 150]
    noise = np.random.default_rng(0).normal(size=(2, SIDE, SIDE)).astype(np.float32)
    header = wcs.to_header()
    header["BUNIT"] = "nJy"
    planes = [fits.ImageHDU(plane, header, name=band) for plane, band in zip(noise, "gr", strict=True)]
    fits.HDUList([fits.PrimaryHDU(), *planes]).writeto(spaced / "sky.fits")
    return spaced / "sky.fits"


def predict(sky: Path, *words: object) -> Path:
    out = sky.with_name("c.parquet")
    arguments = ["predict", sky, "--out", out, "--window", 192, "--overlap", 32, "--no-photometry", *words]
    cli.app([str(word) for word in arguments], standalone_mode=False)
    return out


def test_endpoints_are_listed_with_commas_or_one_by_one(spaced: Path) -> None:
    odd = spaced / "a,b"
    odd.mkdir()
    assert server_list(["x,y", " z ", "x", str(odd), ","]) == ("x", "y", "z", str(odd))


def test_a_url_needs_a_token_and_the_names_of_bands(sky: Path, endpoint: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPDISC_OPS_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="needs a token"):
        predict(sky, "--server", endpoint.url)
    monkeypatch.setenv("DEEPDISC_OPS_TOKEN", "secret")
    with pytest.raises(ConfigError, match="add --plane-bands"):
        predict(sky, "--server", endpoint.url)
    table = read_catalog(predict(sky, "--server", endpoint.url, "--plane-bands", "g,r"))
    assert len(table) == len(endpoint.requests) == 4
    assert table.meta["model"] == "1"
    with pytest.raises(AccessDenied, match="does not accept the token"):
        predict(sky, "--server", endpoint.url, "--plane-bands", "g,r", "--token", "other")


def test_what_was_settled_at_the_start_of_a_server_is_refused(sky: Path, endpoint: ScriptedEndpoint) -> None:
    for words in (("--set", "match=union"), ("--memory", "swap"), ("--skip-failing",)):
        with pytest.raises(ConfigError, match=f"does not understand {words[0]}"):
            predict(sky, "--server", endpoint.url, *words)
    with pytest.raises(ConfigError, match="either --model or --server"):
        predict(sky, "--server", ",")
