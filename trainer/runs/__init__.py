"""A run's folder: record, checkpoints, chains of stages, and the model back from it."""
