"""Predictions of a run's time and memory, made before the run starts."""
