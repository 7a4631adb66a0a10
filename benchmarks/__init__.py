"""Programs that print and keep the ratios which the README quotes: ``python -m benchmarks.NAME [--quick]``."""
