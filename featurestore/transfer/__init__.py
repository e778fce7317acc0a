"""Copies of stores: push and pull, union and subset, exchange formats."""
