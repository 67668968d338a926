"""Exports of a network: files for other programs, a model card, a web page and a hub."""
