"""The rule of NGOptimizer: whitened directions and learned step lengths."""
