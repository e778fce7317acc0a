"""Keeping a store sound: verification, repair, removal on request."""
