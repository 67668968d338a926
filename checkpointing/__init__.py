"""Code that saves, finds and loads checkpoints and weights files."""
