"""Code that shares a network: exported files, a model card, a web page and uploads to a hub."""
