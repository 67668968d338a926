"""The networks that can be trained: DeepLabV3+ and networks from other libraries."""
