"""Ray Tune sweeps and the choice of ensemble members."""
