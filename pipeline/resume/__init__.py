"""What an extraction takes over from what is there: tokens that still hold, another store's cells, clips to retry."""
