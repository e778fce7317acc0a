"""The plan of a run, the training loop, its stages and its processes."""
