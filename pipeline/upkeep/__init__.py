"""What becomes of a store that is there: changes explained, media refreshed, blocks reused, mended or tried again."""
