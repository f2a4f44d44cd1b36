"""Data sets, their splits, and the batches of an epoch."""
