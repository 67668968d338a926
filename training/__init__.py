"""Training code, for everything that differs from Composer's defaults."""
