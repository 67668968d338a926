"""Code that reads data sets: layouts on disk, mask formats and sample loading."""
