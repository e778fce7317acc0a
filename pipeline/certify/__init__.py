"""What a store's tokens are worth: canary clips and parity, and what each storage dtype loses."""
