"""Data sets: layouts on disk, mask formats, and the loading of samples."""
