"""What a plain training run never loads: preparing data, planning, sharing and video."""
