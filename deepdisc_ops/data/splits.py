"""Train, validation, calibration and test by sky position, stratified by redshift, stored beside the records.

The sky is cut into cells and a cell goes to one split as a whole. Cells are sorted by the mean redshift of their labelled
objects into strata of about equal numbers of records, and each stratum is dealt out in the asked proportions. An image that
overlaps one of a split that must stay unseen longer (test, then calibration, validation, train) is left out: its split is "".

Random partitions, for ensembles whose members are each trained on one, deal the cells of train and validation out anew.
Ranks order the records at random once and for all: the share f of a split are its records of the lowest ranks.

Glossary: N records, K partitions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from deepdisc_ops.data.footprints import overlapping, sky_cells
from deepdisc_ops.data.records import GALAXY, SPLITS
from deepdisc_ops.errors import CatalogError, ConfigError

if TYPE_CHECKING:
    from deepdisc_ops.data.store import Dataset, Records

FILE = "splits.parquet"
UNUSED = ""
METADATA_KEY = b"deepdisc_ops"

_TRAINED = ("train", "validation")


@dataclass(frozen=True)
class SplitTable:
    """The stored splits of N records.

    keys (N,) in order; split (N,) one of `SPLITS` or "" for unused; rank (N,) in [0, 1); partitions (N, K) "train",
    "validation" or "" for what is in neither; settings: what they were made with, and how many images overlaps cost.
    """

    keys: NDArray[np.str_]
    split: NDArray[np.str_]
    rank: NDArray[np.float64]
    partitions: NDArray[np.str_]
    settings: Mapping[str, Any]

    def look_up(self, keys: NDArray[np.str_]) -> tuple[NDArray[np.str_], NDArray[np.float64], int]:
        """Split and rank of each key, "" and 1 where the table does not know it, and how many those are."""
        place, known = self._places(keys)
        split = np.where(known, self.split[place], UNUSED) if len(self.keys) else np.full(len(keys), UNUSED)
        rank = np.where(known, self.rank[place], 1.0) if len(self.keys) else np.ones(len(keys))
        return split, rank, int((~known).sum())

    def partition(self, number: int, keys: NDArray[np.str_]) -> NDArray[np.str_]:
        """Split of each key in a random partition: test and calibration as ever, train and validation dealt anew."""
        count = self.partitions.shape[1]
        if not 0 <= number < count:
            raise CatalogError(f"partition {number} is not there: the stored splits have {count}, numbered from 0")
        place, known = self._places(keys)
        kept = ~np.isin(self.split, _TRAINED) & (self.split != UNUSED)
        assigned = np.where(kept, self.split, self.partitions[:, number])
        return np.where(known, assigned[place], UNUSED)

    def _places(self, keys: NDArray[np.str_]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        place = np.minimum(np.searchsorted(self.keys, keys), max(len(self.keys) - 1, 0))
        return place, self.keys[place] == keys if len(self.keys) else np.zeros(len(keys), bool)


def make_splits(
    dataset: Dataset,
    fractions: Mapping[str, float],
    *,
    seed: int,
    cell_arcmin: float = 10.0,
    redshift_bins: int = 5,
    partitions: int = 10,
) -> SplitTable:
    """Deal the records of a data set out to splits and store the result; the same arguments give the same splits.

    fractions of the records by split, summing to 1; cell_arcmin: side of the cells of sky that stay together;
    redshift_bins: strata of mean redshift; partitions: how many random partitions of train and validation.
    Raises `ConfigError` for settings that cannot be met, `CatalogError` for records without a position.
    """
    wanted = _check(fractions, cell_arcmin, redshift_bins, partitions)
    dataset = dataset.refresh()
    records = dataset.records()
    _check_positions(records)
    cells = np.unique(sky_cells(records.centres, cell_arcmin), return_inverse=True)[1]
    strata = _strata(cells, _mean_redshift(records, cells), redshift_bins)
    sizes = np.bincount(cells)
    streams = np.random.SeedSequence(seed).spawn(partitions + 2)
    corners = records.corners
    dealt = _deal(sizes, strata, wanted, np.random.default_rng(streams[0]))[cells]
    _check_dealt(dealt, wanted, len(sizes), cell_arcmin)
    split = _without_overlaps(dealt, corners)
    trained = np.isin(dealt, _TRAINED) & ~_overlaps_unseen(dealt, corners)
    own = {name: wanted[name] for name in _TRAINED if name in wanted}
    columns = []
    for stream in streams[2:]:
        column = np.full(len(records), UNUSED, "U16")
        if own:
            free = np.bincount(cells, trained, len(sizes)).astype(np.int64)
            anew = _deal(free, strata, own, np.random.default_rng(stream))[cells]
            column[trained] = _without_overlaps(anew[trained], corners[trained])
        columns.append(column)
    settings = {
        "fractions": wanted,
        "seed": seed,
        "cell_arcmin": cell_arcmin,
        "redshift_bins": redshift_bins,
        "partitions": partitions,
        "cells": len(sizes),
        "left_out": int((split == UNUSED).sum()),
    }
    ranks = np.random.default_rng(streams[1]).permutation(len(records)) / len(records)
    table = SplitTable(
        records.keys, split, ranks, np.stack(columns, axis=1) if columns else np.zeros((len(records), 0), "U16"), settings
    )
    write_splits(dataset.path, table)
    return table


def _check(fractions: Mapping[str, float], cell_arcmin: float, redshift_bins: int, partitions: int) -> dict[str, float]:
    faults = [f"unknown split {name!r}, expected some of {', '.join(SPLITS)}" for name in fractions if name not in SPLITS]
    faults += [f"fraction of {name} is {share}, expected 0 to 1" for name, share in fractions.items() if not 0 <= share <= 1]
    if not faults and abs(sum(fractions.values()) - 1) > 1e-6:
        faults.append(f"fractions sum to {sum(fractions.values()):g}, expected 1")
    if not 0 < cell_arcmin <= 10800:
        faults.append(f"cell_arcmin is {cell_arcmin}, expected more than 0 and at most 10800")
    if redshift_bins < 1 or partitions < 0:
        faults.append(f"redshift_bins is {redshift_bins} and partitions {partitions}, expected at least 1 and 0")
    if faults:
        raise ConfigError("; ".join(faults))
    return {name: float(fractions[name]) for name in SPLITS if fractions.get(name)}


def _check_positions(records: Records) -> None:
    lost = np.flatnonzero(~np.isfinite(records.centres).all(axis=1))
    if len(lost):
        raise CatalogError(
            f"{len(lost)} of {len(records)} records have no position (the first is {records.keys[lost[0]]!r}): neither a WCS nor "
            "an object with ra and dec; write them again with one, or keep the splits they were given"
        )


def _mean_redshift(records: Records, cells: NDArray[np.intp]) -> NDArray[np.float64]:
    """(cells,) mean redshift of the labelled galaxies, NaN where there is none."""
    redshift, of = records.column("redshift")
    classes, _ = records.column("classes")
    labelled = np.isfinite(redshift) & (classes == GALAXY)
    number = int(cells.max()) + 1
    counts = np.bincount(cells[of[labelled]], minlength=number)
    sums = np.bincount(cells[of[labelled]], redshift[labelled].astype(np.float64), number)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _strata(cells: NDArray[np.intp], redshift: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    """(cells,) stratum of each cell: equal numbers of records by rising redshift; those without any are the last one."""
    sizes = np.bincount(cells)
    order = np.argsort(redshift, kind="stable")  # NaN comes last
    labelled = np.isfinite(redshift[order])
    total = sizes[order][labelled].sum()
    middle = np.cumsum(sizes[order]) - sizes[order] / 2
    strata = np.empty(len(sizes), np.int64)
    strata[order] = np.where(labelled, np.minimum(bins * middle // max(total, 1), bins - 1), bins).astype(np.int64)
    return strata


def _deal(
    sizes: NDArray[np.int64], strata: NDArray[np.int64], fractions: Mapping[str, float], rng: np.random.Generator
) -> NDArray[np.str_]:
    """(cells,) split of each cell: in random order within its stratum, each to the split that lags most behind its share.

    What a split lags is carried from stratum to stratum, so that the totals come out as asked too.
    """
    names = list(fractions)
    shares = np.array([fractions[name] for name in names]) / sum(fractions.values())
    lag = np.zeros(len(names))
    dealt = np.full(len(sizes), UNUSED, "U16")
    for stratum in np.unique(strata):
        for cell in rng.permutation(np.flatnonzero(strata == stratum)):
            lag += shares * sizes[cell]
            chosen = int(np.argmax(lag))
            lag[chosen] -= sizes[cell]
            dealt[cell] = names[chosen]
    return dealt


def _check_dealt(dealt: NDArray[np.str_], wanted: Mapping[str, float], cells: int, cell_arcmin: float) -> None:
    empty = [name for name in wanted if not (dealt == name).any()]
    if empty:
        raise ConfigError(
            f"no record for {', '.join(empty)}: the {len(dealt)} records lie in {cells} cell{'s' * (cells > 1)} "
            f"of {cell_arcmin:g} arcmin; use a smaller cell_arcmin, larger fractions, or more sky"
        )


def _without_overlaps(dealt: NDArray[np.str_], corners: NDArray[np.float64]) -> NDArray[np.str_]:
    """The splits with "" for images that overlap one of a split that must stay unseen longer."""
    split = dealt.copy()
    for number, name in enumerate(SPLITS[:-1]):
        mine = np.flatnonzero(dealt == name)
        later = np.isin(dealt, SPLITS[number + 1 :])
        split[mine[overlapping(corners[mine], corners[later])]] = UNUSED
    return split


def _overlaps_unseen(dealt: NDArray[np.str_], corners: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(N,) which images overlap one of calibration or test."""
    unseen = np.isin(dealt, [name for name in SPLITS if name not in _TRAINED])
    return overlapping(corners, corners[unseen])


def write_splits(path: Path, table: SplitTable) -> None:
    """Store splits in the folder of their data set; the file is replaced as a whole."""
    columns = {"key": table.keys, "split": table.split, "rank": table.rank}
    columns |= {f"partition_{number}": table.partitions[:, number] for number in range(table.partitions.shape[1])}
    arrow = pa.table({name: pa.array(column) for name, column in columns.items()})
    unfinished = path / f".{FILE}.part"
    pq.write_table(arrow.replace_schema_metadata({METADATA_KEY: json.dumps(dict(table.settings))}), unfinished)
    unfinished.replace(path / FILE)


def read_splits(path: Path) -> SplitTable | None:
    """The stored splits of the data set in ``path``, or None if there are none."""
    source = path / FILE
    if not source.is_file():
        return None
    try:
        arrow = pq.read_table(source)
        settings = json.loads(arrow.schema.metadata[METADATA_KEY])
        columns = {name: arrow[name].to_numpy() for name in arrow.column_names}
        names = [f"partition_{number}" for number in range(settings["partitions"])]
        partitions = [columns[name].astype(np.str_) for name in names]
        return SplitTable(
            keys=columns["key"].astype(np.str_),
            split=columns["split"].astype(np.str_),
            rank=columns["rank"].astype(np.float64),
            partitions=np.stack(partitions, axis=1) if partitions else np.zeros((len(arrow), 0), "U16"),
            settings=settings,
        )
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise CatalogError(
            f"{source} cannot be read ({' '.join(str(error).split())}); delete it or make the splits again"
        ) from None
