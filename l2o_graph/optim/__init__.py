"""The rule: directions that are whitened, lengths that are learned."""
