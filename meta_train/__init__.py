"""Meta-training and benchmarking of learned optimizers."""
