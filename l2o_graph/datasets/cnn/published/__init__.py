"""Readers of published zoos of CNNs, in their original formats."""

from l2o_graph.datasets.cnn.published.small_zoo import read_small_zoo
from l2o_graph.datasets.cnn.published.wild_park import read_wild_park

__all__ = ["read_small_zoo", "read_wild_park"]
