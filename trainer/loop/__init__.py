"""Training: the plan of a run, its steps, its processes and what is measured on the way."""
