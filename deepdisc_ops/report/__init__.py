"""What `evaluate` leaves behind: metrics.json, figures and one page of a catalogue held against its truth."""

from deepdisc_ops.report.evaluation import evaluate_files, rows
from deepdisc_ops.report.picture import draw_picture, rgb_planes

__all__ = ["draw_picture", "evaluate_files", "rgb_planes", "rows"]
