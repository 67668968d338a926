"""Losses, metrics, class names and drawings for segmentation."""
