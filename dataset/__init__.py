"""What the files of a data set may look like, and how they become samples."""
