"""Checkpoints and files of weights: saving, finding and loading."""
