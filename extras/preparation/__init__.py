"""Tools that check and describe data sets, and converters for the files of labelling tools."""
