"""Giving stores away and taking them in: transfer, union and subset, exchange formats."""
