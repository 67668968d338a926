"""Check and describe data sets, and read what labelling tools write."""
