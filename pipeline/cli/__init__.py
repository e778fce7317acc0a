"""The command line `merv-pipeline`: options, commands and output; the work is done by the library."""
