"""Losses, metrics, classes and drawings for segmentation."""
