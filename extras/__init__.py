"""Features that a plain training run never loads: preparing data, planning, sharing, video."""
