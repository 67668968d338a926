"""Training: the parts of a run that differ from Composer's defaults."""
