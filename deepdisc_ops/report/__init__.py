"""What `evaluate` leaves behind: metrics.json, figures and one page of a catalogue held against its truth, or against others."""

from deepdisc_ops.report.colours import Coverage, map_colours
from deepdisc_ops.report.comparison import Comparison, comparison_rows
from deepdisc_ops.report.evaluation import compare_files, evaluate_files, rows, tracked
from deepdisc_ops.report.picture import draw_picture, rgb_planes

__all__ = [
    "Comparison",
    "Coverage",
    "compare_files",
    "comparison_rows",
    "draw_picture",
    "evaluate_files",
    "map_colours",
    "rgb_planes",
    "rows",
    "tracked",
]
