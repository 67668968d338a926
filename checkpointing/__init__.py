"""Saving, finding and loading of checkpoints and weights files."""
