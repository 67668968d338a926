"""Code for data sets: their layout on disk, mask formats, and loading of samples."""
