"""Tools that predict a run's time and memory before it starts."""
