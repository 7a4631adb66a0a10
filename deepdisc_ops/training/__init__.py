"""Training one network: the loop, its checkpoints."""
