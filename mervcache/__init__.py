"""Base package shared by featurestore, jobs, pipeline and trainer: errors, console output, typed configs, files."""
