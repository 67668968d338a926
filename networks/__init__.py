"""Networks to train, which are DeepLabV3+ and networks from other libraries."""
