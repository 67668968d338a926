"""How a run differs from what Composer does by itself."""
