"""docs/studies.md, written from the results of the studies: each figure beside what the paper found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study_list import BLUR_PIXELS, STUDIES, Study

HEAD = f"""# The papers' studies, small

Each variant is preset `small`, trained for the steps stated on the train split of `lsst_reference`, from the same seed or, where a
study says so, from the same member of models/, which learned from that split at 5 years in all bands (its first convolution loses
the bands that a variant does not see). It is judged on the test split, on the gold galaxies (i < 25.3, clear of the border) that
every variant found within 0.5". Bias, sigma_IQR and outliers are those of the LSST convention and of the mode, errors are from the
bootstrap. Differences from the first variant (of the same galaxies, with stars or without) have smaller errors, from samples drawn
for both at once; what another seed of the training would give is in none of them. Blurred images are convolved with a Gaussian of
{BLUR_PIXELS:g} px.

    $ python -m benchmarks.studies --study NAME --minutes 20

trains, judges and writes this page (`--render`: the page alone). A minute stands for 240 steps, as on the fastest machine we had;
studies of members train none and ask those of `models/lsst-ensemble`. The dotted line is the first variant.
"""


ADAPTED = (
    "The member had learned under the conditions of the first variant: what others lose is an upper limit, as far as they had not "
    "yet adapted."
)
ENDS = "NLL of the validation split, after three quarters of the steps and at the end, of which the better one is asked:"


def write_page(results: Path, page: Path) -> Path:
    """Write the page from the result files that are there; studies without one are said not to have run."""
    page.parent.mkdir(parents=True, exist_ok=True)
    unfinished = page.with_name(f".{page.name}.part")
    unfinished.write_text("\n".join([HEAD, *sections(results)]))
    unfinished.replace(page)
    return page


def sections(results: Path) -> Iterator[str]:
    """A section for each study."""
    for name, study in STUDIES.items():
        file = results / f"study_{name}.json"
        yield f"## {study.title}\n\n{study.question}\n"
        yield f"*What the papers found.* {study.paper}\n"
        if not file.is_file():
            yield f"*Here.* Not run yet: `python -m benchmarks.studies --study {name}`.\n"
            continue
        result = json.loads(file.read_text())
        yield from found(name, study, result)


def found(name: str, study: Study, result: Mapping[str, Any]) -> Iterator[str]:
    """What a study found here: figure, table, and where it comes from."""
    figures = result["figures"]
    yield f"![{study.title}](study-{name}.png)\n"
    yield "| | bias | sigma_IQR | less the first's | outliers | CDE loss | NLL | less the first's | PIT KS |"
    yield "|" + 9 * "---|"
    for label, one in figures["variants"].items():
        share, error = 100 * one["outlier_fraction"], 100 * one["outlier_fraction_error"]
        uniform = f"{one['ks']:.4f} ± {one['ks_error']:.4f}" if "ks" in one else ""
        yield (
            f"| {label} | {one['bias']:+.4f} ± {one['bias_error']:.4f} | {one['sigma_iqr']:.4f} ± {one['sigma_iqr_error']:.4f} "
            f"| {less(one, 'sigma_iqr', 4)} "
            f"| {share:.1f} ± {error:.1f} % | {one['cde_loss']:.2f} ± {one['cde_loss_error']:.2f} | {one['nll']:.3f} ± "
            f"{one['nll_error']:.3f} | {less(one, 'nll', 3)} | {uniform} |"
        )
    complete = ", ".join(f"{label} {100 * share:.1f} %" for label, share in figures["completeness"].items())
    common = f"{figures['common']} galaxies that all found, of {figures['test']}"
    common += f", their median i {figures['median_magnitude']:.1f}" if "median_magnitude" in figures else ""
    yield f"\n*Here.* {common}; completeness: {complete}."
    made = f"`{result['command']}`, commit {result['commit']}, {result['date']}"
    trained = (
        f"{figures['steps']} steps of {figures['batch']} crops each" if figures["steps"] else f"Members of `{figures['members']}`"
    )
    trained += f", all from the member of `{figures['start']}`" if figures.get("start") else ""
    trained += f" ({how_trained(figures['training'])})" if figures.get("training") else ""
    yield f"{trained}; {made}."
    if figures.get("start"):
        yield ADAPTED
    if figures.get("curves"):
        yield f"{ENDS} {', '.join(ends(figures['curves']))}."
    yield f"{study.note}\n"


def less(one: Mapping[str, Any], name: str, digits: int) -> str:
    """A variant's difference from the first, with its error; nothing for the first."""
    if "less_first" not in one:
        return ""
    return f"{one['less_first'][name]:+.{digits}f} ± {one['less_first'][f'{name}_error']:.{digits}f}"


def how_trained(members: Mapping[str, Mapping[str, Any]]) -> str:
    """Commits, ranks, and the steps of the members that are asked."""
    commits, ranks = (sorted({str(one[key]) for one in members.values()}) for key in ("commit", "ranks"))
    asked = ", ".join(str(one["step"]) for one in members.values())
    return f"commit {', '.join(commits)}, ranks {', '.join(ranks)}; asked as they were after {asked}"


def ends(curves: Mapping[str, Sequence[Sequence[float]]]) -> Iterator[str]:
    """The last two validations of each variant."""
    for label, points in curves.items():
        if len(points) > 1:
            yield f"{label} {points[-2][1]:.3f}, {points[-1][1]:.3f}"
