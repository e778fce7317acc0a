"""The commands of `merv-pipeline`: options, words and tables; the work is done elsewhere."""
