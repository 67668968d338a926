"""Tools for sharing a network: exporters, a model card, a web page, and uploads to a hub."""
