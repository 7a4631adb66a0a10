"""One spectroscopic redshift for each photometric source, compiled from several spectroscopic catalogues.

The rules are those of the JADES compilation (Merz et al. 2025, section 2; SCIENCE.md): every catalogue has quality rules of its
own; a spectrum belongs to the brightest photometric source within the radius (to the nearest if no band is named); a source
claimed by several spectra of one catalogue keeps that of the best quality, then the nearest; sources on which two catalogues
disagree are left out altogether; among catalogues that agree, the first in the list is believed.

The JADES rules as settings (names of columns are those of the files at hand)::

    catalogs:
      - name: NIRSpec
        path: nirspec_goods_s.fits
        redshift: z_Spec
        rules:
          - {name: DR_flag is False, column: DR_flag, is_in: [false]}
          - {name: "flag A, B or C", column: z_Spec_flag, is_in: [A, B, C]}
        quality: z_Spec_flag
        best_quality: [A, B, C]
      - name: MUSE
        path: muse.fits
        rules:
          - {name: zconf is not 1, column: zconf, not_in: [1]}
          - {name: Mconf is not 1, column: Mconf, not_in: [1]}
        brightest_in: F775W
        quality: zconf
      - name: ASTRODEEP
        path: astrodeep_gs43.fits
        redshift: zspec
        no_redshift: [-99]
        brightest_in: F160W

Glossary: N photometric sources, S spectra of one catalogue, M claims of one catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from astropy import units
from astropy.coordinates import SkyCoord, search_around_sky
from astropy.table import Table
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, model_validator

from deepdisc_ops.config import Settings
from deepdisc_ops.data.tables import (
    Rule,
    Sources,
    Value,
    as_text,
    numbers,
    positions,
    read_table,
    redshifts,
    require,
    select_rows,
)
from deepdisc_ops.errors import CatalogError, ConfigError

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


class SpecCatalog(Settings):
    """A spectroscopic catalogue and the rules by which its redshifts are believed."""

    name: str
    path: Path
    redshift: str = "z"
    no_redshift: tuple[float, ...] = Field((), description="values that mean no redshift, as -1 or -99")
    rules: tuple[Rule, ...] = Field((), description="rows that pass all of them count")
    match: Literal["position", "id"] = Field("position", description="by place on the sky, or by the photometric source's id")
    ra: str = "ra"
    dec: str = "dec"
    id: str | None = Field(None, description="column of the photometric source's id, where match is id")
    radius_arcsec: PositiveFloat = 0.5
    brightest_in: str | None = Field(None, description="band of the photometric catalogue in which the brightest candidate wins")
    quality: str | None = Field(None, description="column that is kept with the redshift, as flag or zconf")
    best_quality: tuple[Value, ...] = Field((), description="its values from the best on: the first wins among several spectra")

    @model_validator(mode="after")
    def _matched_by_something(self) -> SpecCatalog:
        if (self.match == "id") != (self.id is not None):
            raise ValueError(f"spectroscopic catalogue {self.name!r}: the column id goes with match: id, and only with it")
        if self.best_quality and self.quality is None:
            raise ValueError(f"spectroscopic catalogue {self.name!r}: best_quality needs the column quality")
        return self


class SpecSettings(Settings):
    """Spectroscopic catalogues in the order in which they are believed."""

    catalogs: Annotated[tuple[SpecCatalog, ...], Field(min_length=1)]
    max_disagreement: PositiveFloat = Field(0.1, description="catalogues differ when |dz|/(1+z) exceeds this, z of the first")

    @model_validator(mode="after")
    def _distinct_names(self) -> SpecSettings:
        names = [catalog.name for catalog in self.catalogs]
        if len(set(names)) < len(names):
            raise ValueError(f"spectroscopic catalogues {', '.join(names)}: expected names that differ")
        return self


@dataclass(frozen=True)
class Step:
    """What one rule did: rows removed and left."""

    catalog: str
    rule: str
    removed: int
    left: int


@dataclass(frozen=True)
class Compilation:
    """The result: one row a source, and what every rule did.

    table: id (of the photometric source), redshift, catalog, row (of the spectroscopic file), quality (text), separation
    (arcsec, NaN where matched by id), n_catalogs (that have the source).
    """

    table: Table
    steps: tuple[Step, ...]

    def __len__(self) -> int:
        return len(self.table)

    def summary(self) -> str:
        """One line a rule."""
        width = max(len(f"{step.catalog}: {step.rule}") for step in self.steps)
        return "\n".join(f"{f'{step.catalog}: {step.rule}':<{width}}  -{step.removed:<7d} {step.left:d}" for step in self.steps)

    def redshift_of(self, ids: NDArray[np.int64]) -> Floats:
        """(N,) redshifts of photometric ids, NaN for those that are not in the compilation."""
        known = np.asarray(self.table["id"], np.int64)
        order = np.argsort(known)
        place = np.searchsorted(known, ids, sorter=order)
        place = order[np.minimum(place, len(order) - 1)]
        return np.where(known[place] == ids, np.asarray(self.table["redshift"], np.float64)[place], np.nan)


@dataclass(frozen=True)
class _Claims:
    """M sources that a catalogue gives a redshift: source (M,) index, redshift, row of the file, quality, separation."""

    source: Indices
    redshift: Floats
    row: Indices
    quality: NDArray[np.str_]
    separation: Floats


def compile_redshifts(settings: SpecSettings, sources: Sources) -> Compilation:
    """Compile all catalogues onto the photometric sources; no redshift at all is an error."""
    claims, steps = [], []
    for catalog in settings.catalogs:
        found, done = _claims(catalog, sources)
        claims.append(found)
        steps += done
    redshift, chosen, number = _merge(claims, len(sources))
    differ = _disagree(redshift, settings.max_disagreement)
    kept = np.flatnonzero((chosen >= 0) & ~differ)
    everything = "all catalogues"
    steps.append(Step(everything, "sources with a redshift", 0, int((chosen >= 0).sum())))
    steps.append(Step(everything, f"catalogues differ by more than {settings.max_disagreement:g}", int(differ.sum()), len(kept)))
    if not len(kept):
        listed = "; ".join(f"{step.catalog}: {step.rule} -{step.removed} leaves {step.left}" for step in steps)
        raise CatalogError(f"no photometric source has a spectroscopic redshift ({listed}); check positions, radius and rules")
    return Compilation(_table(settings, sources, claims, chosen, number, kept), tuple(steps))


def brightest_matches(
    spec_sky: SkyCoord, phot_sky: SkyCoord, radius_arcsec: float, magnitude: Floats | None
) -> tuple[Indices, Indices, Floats]:
    """Of each spectrum within the radius of a source, the source: spectrum, source, separation (arcsec), by spectrum.

    The brightest of the candidates by ``magnitude`` (N,), NaN being the faintest; equal ones, and all without magnitudes, by
    separation.
    """
    if not len(spec_sky) or not len(phot_sky):
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    spectrum, source, separation, _ = search_around_sky(spec_sky, phot_sky, radius_arcsec * units.arcsec)
    separation = np.asarray(separation.to_value(units.arcsec), np.float64)
    brightness = np.zeros(len(source)) if magnitude is None else np.nan_to_num(magnitude[source], nan=np.inf)
    order = np.lexsort((source, separation, brightness, spectrum))
    spectrum, source, separation = spectrum[order], source[order], separation[order]
    first = np.flatnonzero(np.concatenate([[True], spectrum[1:] != spectrum[:-1]])) if len(spectrum) else np.zeros(0, np.int64)
    return spectrum[first].astype(np.int64), source[first].astype(np.int64), separation[first]


def _claims(catalog: SpecCatalog, sources: Sources) -> tuple[_Claims, list[Step]]:
    """What one catalogue says of the sources, at most one redshift each, and the steps that led there."""
    source = f"spectroscopic catalogue {catalog.name} ({catalog.path})"
    table = read_table(catalog.path)
    names = [catalog.redshift, catalog.quality, *((catalog.ra, catalog.dec) if catalog.match == "position" else (catalog.id,))]
    require(table, [name for name in names if name], source)
    table["_row"] = np.arange(len(table))
    steps = [Step(catalog.name, "rows", 0, len(table))]
    table, removed = select_rows(table, catalog.rules, source)
    for name, count in removed:
        steps.append(Step(catalog.name, name, count, steps[-1].left - count))
    values = redshifts(table, catalog.redshift, catalog.no_redshift, source)
    table, values = table[np.isfinite(values)], values[np.isfinite(values)]
    steps.append(Step(catalog.name, "no redshift", steps[-1].left - len(table), len(table)))
    spectrum, target, separation = _targets(catalog, table, sources, source)
    steps.append(Step(catalog.name, "no photometric source", len(table) - len(spectrum), len(spectrum)))
    kept = _one_each(target, _ranks(catalog, table, source)[spectrum], separation)
    steps.append(Step(catalog.name, "another spectrum of the same source", len(spectrum) - len(kept), len(kept)))
    spectrum = spectrum[kept]
    quality = [as_text(table[catalog.quality][i]) if catalog.quality else "" for i in spectrum]
    rows = np.asarray(table["_row"])[spectrum]
    return _Claims(target[kept], values[spectrum], rows, np.array(quality, np.str_), separation[kept]), steps


def _targets(catalog: SpecCatalog, table: Table, sources: Sources, source: str) -> tuple[Indices, Indices, Floats]:
    """Which source each spectrum belongs to: spectrum, source, separation."""
    if catalog.id is not None:
        wanted = np.nan_to_num(numbers(table, catalog.id, source), nan=-1).astype(np.int64)
        order = np.argsort(sources.ids)
        place = order[np.minimum(np.searchsorted(sources.ids, wanted, sorter=order), len(order) - 1)]
        known = np.flatnonzero(sources.ids[place] == wanted)
        return known, place[known], np.full(len(known), np.nan)
    band = catalog.brightest_in
    if band is not None and band not in sources.magnitudes:
        there = ", ".join(sources.magnitudes) or "none"
        raise ConfigError(
            f"{source}: brightest_in is {band}, but the photometric catalogue has magnitudes in {there}; add it to magnitudes"
        )
    ra, dec = positions(table, catalog.ra, catalog.dec, source)
    magnitude = None if band is None else sources.magnitudes[band]
    return brightest_matches(
        SkyCoord(ra, dec, unit="deg"), SkyCoord(sources.ra, sources.dec, unit="deg"), catalog.radius_arcsec, magnitude
    )


def _ranks(catalog: SpecCatalog, table: Table, source: str) -> Indices:
    """(S,) rank of each spectrum's quality, 0 the best; what best_quality does not list comes last."""
    ranks = np.full(len(table), len(catalog.best_quality))
    for rank, value in reversed(list(enumerate(catalog.best_quality))):
        rule = Rule(name="best_quality", column=str(catalog.quality), is_in=(value,))
        ranks[rule.passes(table, source)] = rank
    return ranks


def _one_each(target: Indices, rank: Indices, separation: Floats) -> Indices:
    """Positions of the claims that remain when each target keeps the best ranked, then the nearest, then the first."""
    order = np.lexsort((np.arange(len(target)), np.nan_to_num(separation), rank, target))
    first = np.flatnonzero(np.concatenate([[True], target[order][1:] != target[order][:-1]])) if len(order) else order
    return np.sort(order[first]).astype(np.int64)


def _merge(claims: Sequence[_Claims], count: int) -> tuple[Floats, Indices, Indices]:
    """Redshifts (catalogues, N) with NaN for none, the first catalogue (N,) that has each source, -1 for none, and how many do."""
    redshift = np.full((len(claims), count), np.nan)
    for catalog, found in enumerate(claims):
        redshift[catalog, found.source] = found.redshift
    known = np.isfinite(redshift)
    return redshift, np.where(known.any(axis=0), known.argmax(axis=0), -1), known.sum(axis=0)


def _disagree(redshift: Floats, limit: float) -> NDArray[np.bool_]:
    """(N,) sources of which two catalogues differ by more than the limit, relative to the one believed more."""
    differ = np.zeros(redshift.shape[1], bool)
    for i, believed in enumerate(redshift):
        for other in redshift[i + 1 :]:
            differ |= np.abs(other - believed) / (1 + believed) > limit
    return differ


def _table(
    settings: SpecSettings, sources: Sources, claims: Sequence[_Claims], chosen: Indices, number: Indices, kept: Indices
) -> Table:
    """The compilation as a table, in the order of the photometric catalogue."""
    names = np.array([catalog.name for catalog in settings.catalogs])
    rows: dict[str, NDArray] = {
        "redshift": np.full(len(sources), np.nan),
        "row": np.full(len(sources), -1),
        "quality": np.full(len(sources), "", max((found.quality.dtype for found in claims), key=lambda dtype: dtype.itemsize)),
        "separation": np.full(len(sources), np.nan),
    }
    for catalog, found in enumerate(claims):
        mine = chosen[found.source] == catalog
        for name, column in rows.items():
            column[found.source[mine]] = getattr(found, name)[mine]
    return Table(
        {
            "id": sources.ids[kept],
            "redshift": rows["redshift"][kept],
            "catalog": names[chosen[kept]],
            "row": rows["row"][kept],
            "quality": rows["quality"][kept],
            "separation": rows["separation"][kept],
            "n_catalogs": number[kept],
        },
        units={"separation": units.arcsec},
    )
