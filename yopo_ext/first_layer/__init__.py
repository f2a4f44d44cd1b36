"""What a model's first layer computes, and the autograd nodes that take its place during a pass."""
