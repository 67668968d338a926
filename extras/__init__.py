"""Features that a plain training run does not load: data preparation, planning, sharing, video."""
