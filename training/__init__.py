"""Training code that replaces or extends Composer's defaults."""
