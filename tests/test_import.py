"""Importing the package: what it loads, and what it has."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import l2o_graph

HEAVY = ("torch_geometric", "torchvision", "l2o_graph.metanets", "l2o_graph.datasets")


def fresh(code: str) -> None:
    """Run code in an interpreter of its own."""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_loads_what_the_optimizer_needs_and_a_star_all_names():
    fresh(f"""
import sys
import l2o_graph
assert not [name for name in {HEAVY} if name in sys.modules]
import torch
net = torch.nn.Linear(2, 1)
optimizer = l2o_graph.NGOptimizer(net.parameters(), model=net)
net(torch.ones(1, 2)).sum().backward()
optimizer.step()
assert not [name for name in {HEAVY} if name in sys.modules]
from l2o_graph import *
assert not set({l2o_graph.__all__}) - globals().keys()
""")


def test_names_and_rooms_are_there_when_asked_for():
    fresh(f"""
import l2o_graph
assert set({l2o_graph.__all__}) | {{"inr", "cnn"}} <= set(dir(l2o_graph))
for name in {l2o_graph.__all__}:
    assert getattr(l2o_graph, name).__name__ == name
assert l2o_graph.inr.INRClassifier is l2o_graph.INRClassifier
assert l2o_graph.cnn.predict_accuracy is l2o_graph.predict_accuracy
""")
    with pytest.raises(AttributeError, match="module 'l2o_graph' has no attribute 'nothing'"):
        _ = l2o_graph.nothing


def test_checkers_see_the_names_where_they_are_imported_from():
    tree = ast.parse(Path(l2o_graph.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {a.name: node.module for node in block.body for a in node.names}
    assert {k: v for k, v in seen.items() if v != "l2o_graph"} == l2o_graph.LAZY
    for name, module in l2o_graph.LAZY.items():
        assert getattr(importlib.import_module(module), name) is getattr(l2o_graph, name)
