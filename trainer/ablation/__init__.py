"""Ablations: many runs from one store, and what they say about encoders, fusions, projectors and grids."""
