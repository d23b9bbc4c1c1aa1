"""Shorter path of ``l2o_graph.paper.rule``."""

from l2o_graph.paper.rule import PAPER, RuleConfig, UpdateRule, untrained

__all__ = ["PAPER", "RuleConfig", "UpdateRule", "untrained"]
