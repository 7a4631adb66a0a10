"""Training truth from what a user has: segmentation maps, truth catalogues, parametric catalogues, DeepDISC's own JSON."""
