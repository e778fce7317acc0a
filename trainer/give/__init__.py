"""Runs as folders to give away, and released checkpoints as runs."""
