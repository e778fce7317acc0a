"""Commands on a store that is there: changes explained, media verified, blocks mended, the quarantine tried again."""
