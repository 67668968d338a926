"""Training code for everything in which a run differs from Composer's defaults."""
