"""Pictures of redshifts, detections and training, each a matplotlib Figure made from plain arrays.

No pyplot, no global state: figures can be drawn in threads and in servers without a display. style: the one they share, and
`write_figure`; redshifts: point estimates; densities: whole PDFs; samples: completeness and n(z); maps: cells of a
self-organising map, features in a plane; sky: pictures; training: curves of runs and trials.
"""

from deepdisc_ops.photoz.figures.densities import coverage_figure, example_densities, normalised_residuals, pit_figure
from deepdisc_ops.photoz.figures.maps import map_of_cells, map_of_features
from deepdisc_ops.photoz.figures.redshifts import binned_statistics, recovery_figure, redshift_scatter
from deepdisc_ops.photoz.figures.samples import completeness_by_magnitude, redshift_distribution
from deepdisc_ops.photoz.figures.sky import lupton_colours, lupton_picture, rgb_with_boxes
from deepdisc_ops.photoz.figures.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY_BLUE, VERMILION, YELLOW, write_figure
from deepdisc_ops.photoz.figures.training import ScalingSeries, compared_curves, compared_values, loss_curves, scaling_curves

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PURPLE",
    "SKY_BLUE",
    "VERMILION",
    "YELLOW",
    "ScalingSeries",
    "binned_statistics",
    "compared_curves",
    "compared_values",
    "completeness_by_magnitude",
    "coverage_figure",
    "example_densities",
    "loss_curves",
    "lupton_colours",
    "lupton_picture",
    "map_of_cells",
    "map_of_features",
    "normalised_residuals",
    "pit_figure",
    "recovery_figure",
    "redshift_distribution",
    "redshift_scatter",
    "rgb_with_boxes",
    "scaling_curves",
    "write_figure",
]
