"""Verification, repair and removal of clips."""
