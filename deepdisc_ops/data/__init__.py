"""Training sets: simulated skies, truth, records, and the loader that feeds a network."""
