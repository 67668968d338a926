"""What is computed and shown of a segmentation: losses, metrics, classes, pictures."""
