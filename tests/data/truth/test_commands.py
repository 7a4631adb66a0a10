from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from deepdisc_ops.cli.truth import truth_app
from deepdisc_ops.data.store import open_dataset
from deepdisc_ops.errors import CatalogError, ConfigError

from .conftest import SCALE, SquareField


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(truth_app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def write_settings(field: SquareField, **more: object) -> Path:
    path = field.folder / "settings.yaml"
    path.write_text(yaml.safe_dump(field.settings(**more)))
    return path


def test_a_segmentation_map_becomes_a_data_set_and_json_and_a_data_set_again(field: SquareField) -> None:
    output = run("from-segmentation", write_settings(field), "--out", field.folder / "out", "--set", "ebv='0.02'")
    assert "windows that lack a band: 1" in output
    assert "2 records, bands a b" in output
    first, second, third = (field.folder / f"{i}.json" for i in "123")
    run("export-deepdisc", field.folder / "out", "--out", first)
    run("import-deepdisc", first, "--out", field.folder / "again", "--gold-band", "b", "--pixel-scale", str(SCALE))
    run("export-deepdisc", field.folder / "again", "--out", second)
    assert json.loads(first.read_text()) == json.loads(second.read_text())
    with pytest.raises(CatalogError, match="part of a file"):
        run("export-deepdisc", field.folder / "out", "--out", third, "--layout", "dc2")
    assert not third.exists()


def test_a_catalogue_becomes_a_data_set_by_deblending(field: SquareField) -> None:
    settings = field.settings(psf_fwhm=[0.3, 0.3], windows={"width_arcsec": 10.0, "height_arcsec": 8.0})
    settings.pop("segmentation")
    path = field.folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    run("from-catalog", path, "--out", field.folder / "out", "--packed", "--set", "mesh=32")
    (record,) = open_dataset(field.folder / "out").records()
    assert set(record.objects.ids.tolist()) <= {11, 12, 13, 14, 15}
    assert len(record.objects) >= 2


def test_faults_are_named_before_anything_is_written(field: SquareField) -> None:
    with pytest.raises(ConfigError, match="unknown key 'gold_bnd', did you mean 'gold_band'"):
        run("from-segmentation", write_settings(field, gold_bnd="b"), "--out", field.folder / "out")
    with pytest.raises(ConfigError, match="segmentation"):
        run("from-catalog", write_settings(field), "--out", field.folder / "out", "--way", "parametric")
    with pytest.raises(ConfigError, match="split 'x' is unknown"):
        run("import-deepdisc", "x.json", "--out", field.folder / "out", "--split", "x")
    with pytest.raises(ConfigError, match="layout 'x' is unknown"):
        run("export-deepdisc", field.folder / "out", "--out", field.folder / "x.json", "--layout", "x")
    with pytest.raises(CatalogError, match="no .json file"):
        run("export-deepdisc", field.folder / "out", "--out", field.folder / "x")
    assert not (field.folder / "out").exists()
