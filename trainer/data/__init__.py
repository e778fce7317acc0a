"""From stored tokens and samples to batches: prompts, order, collation."""
