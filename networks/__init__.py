"""The networks that can be trained: DeepLabV3+, and networks of other libraries by name."""
