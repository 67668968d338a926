"""Optional features: data preparation, planning, sharing, predictions and videos."""
