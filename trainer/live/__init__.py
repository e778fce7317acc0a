"""Tokens made on the spot instead of read from a store."""
