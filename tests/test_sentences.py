"""What is given in the place of something else is told apart in a sentence, not in a traceback.

Types are watched over in tests, and refused before the package sees them: so these are made in a
process of their own, as users make them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASES = """
import json
import warnings

import torch
from torch import nn

from l2o_graph import INRClassifier, NGOptimizer, PaperOptimizer, neural_graph, predict_accuracy
from l2o_graph.inr import stack_networks
from l2o_graph.rule import RuleConfig, untrained


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def lazy():
    return nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(mlp())


def cnn(**options):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, **options), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10, **options),
    )


def siren(**options):
    return nn.Sequential(
        nn.Linear(2, 32, **options), nn.Linear(32, 32, **options), nn.Linear(32, 1, **options)
    )


def stepped(net):
    bias = nn.Parameter(torch.ones(2))
    bias.grad = torch.ones(2)
    NGOptimizer([*net.parameters(), bias]).step()


def paper(model):
    rule = untrained(RuleConfig("ff", hidden=4, layers=1, inner=4), 0)
    return PaperOptimizer(mlp().parameters(), checkpoint=rule, model=model)


x, images = torch.randn(2, 4), torch.randn(2, 3, 16, 16)
reader = INRClassifier.from_checkpoint("mnist-inr")
CASES = {
    "model by name": lambda: NGOptimizer(mlp().parameters(), model="net"),
    "model by class": lambda: NGOptimizer(mlp().parameters(), model=nn.Linear),
    "scripted model": lambda: NGOptimizer((net := scripted()).parameters(), model=net),
    "model of the paper's": lambda: paper("net"),
    "lazy at a step": lambda: stepped(lazy()),
    "no network": lambda: neural_graph(None),
    "a number for a network": lambda: neural_graph(3),
    "a network by name": lambda: neural_graph("net"),
    "a state": lambda: neural_graph(mlp().state_dict()),
    "a function": lambda: neural_graph(mlp),
    "numbers for parameters": lambda: neural_graph([1.0]),
    "lazy": lambda: neural_graph(lazy()),
    "lazy and a batch": lambda: neural_graph(lazy(), x),
    "lazy parameters": lambda: neural_graph(lazy().named_parameters()),
    "scripted": lambda: neural_graph(scripted()),
    "scripted and a batch": lambda: neural_graph(scripted(), x),
    "traced and a batch": lambda: neural_graph(torch.jit.trace(mlp(), x), x),
    "a number for a batch": lambda: neural_graph(mlp(), 3),
    "predict nothing": lambda: predict_accuracy(None, images),
    "predict parameters": lambda: predict_accuracy(list(cnn().parameters()), images),
    "predict without a batch": lambda: predict_accuracy(cnn(), None),
    "predict for a number": lambda: predict_accuracy(cnn(), 3),
    "predict lazy": lambda: predict_accuracy(nn.Sequential(nn.LazyLinear(10)), x),
    "predict scripted": lambda: predict_accuracy(scripted(), x),
    "predict on meta": lambda: predict_accuracy(cnn().to("meta"), images.to("meta")),
    "predict complex": lambda: predict_accuracy(
        nn.Sequential(nn.Linear(3, 10, dtype=torch.complex64)), torch.ones(2, 3) + 0j
    ),
    "predict nobody": lambda: predict_accuracy(
        nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 10)), torch.ones(2, 3)
    ),
    "predict without computing": lambda: predict_accuracy(nn.Identity(), images),
    "double": lambda: reader(*stack_networks([siren(dtype=torch.float64)])),
    "half": lambda: reader(*stack_networks([siren(dtype=torch.float16)])),
    "one of two is double": lambda: reader(*stack_networks([siren(), siren().double()])),
    "on meta": lambda: reader(*stack_networks([siren(device="meta")])),
    "integers": lambda: reader(*([t.int() for t in kind] for kind in stack_networks([siren()]))),
    "nothing among networks": lambda: stack_networks([siren(), None]),
    "lazy among networks": lambda: stack_networks([nn.Sequential(nn.LazyLinear(1))]),
}

warnings.simplefilter("ignore")
found = {}
for name, act in CASES.items():
    try:
        found[name] = ["nothing", repr(act())]
    except Exception as error:
        found[name] = [type(error).__name__, str(error)]
print(json.dumps(found))
"""

UNINITIALISED = "expected a tensor with a shape, found one of a lazy module, which has none before"
EXPECTED = {
    "model by name": ("TypeError", "model: expected a module, found str 'net'"),
    "model by class": ("TypeError", "model: expected a module, found type"),
    "scripted model": ("TypeError", "model: expected a module that runs in Python, found one of "),
    "model of the paper's": ("TypeError", "model: expected a module, found str 'net'"),
    "lazy at a step": ("ValueError", f"parameter 0: {UNINITIALISED}"),
    "no network": ("TypeError", "network: expected a module, or its parameters() or named_para"),
    "a number for a network": ("TypeError", "network: expected a module, or its parameters()"),
    "a network by name": ("TypeError", "network: expected a module, or its parameters()"),
    "a state": ("TypeError", "network: expected a module, or its parameters()"),
    "a function": ("TypeError", "network: expected a module, or its parameters()"),
    "numbers for parameters": ("TypeError", "parameter 0: expected a tensor, found float 1.0"),
    "lazy": ("ValueError", f"parameter '0.weight': {UNINITIALISED}"),
    "lazy and a batch": ("ValueError", f"parameter '0.weight': {UNINITIALISED}"),
    "lazy parameters": ("ValueError", f"parameter '0.weight': {UNINITIALISED}"),
    "scripted": ("TypeError", "network: expected a module that runs in Python, found one of To"),
    "scripted and a batch": ("TypeError", "network: expected a module that runs in Python, foun"),
    "traced and a batch": ("TypeError", "network: expected a module that runs in Python, found "),
    "a number for a batch": ("TypeError", "inputs: expected a tensor, the arguments or the named"),
    "predict nothing": ("TypeError", "module: expected a module, found NoneType None"),
    "predict parameters": ("TypeError", "module: expected a module, found list"),
    "predict without a batch": ("TypeError", "batch: expected an example input, found None"),
    "predict for a number": ("TypeError", "inputs: expected a tensor, the arguments or the named"),
    "predict lazy": ("ValueError", f"parameter '0.weight': {UNINITIALISED}"),
    "predict scripted": ("TypeError", "module: expected a module that runs in Python, found one"),
    "predict on meta": ("ValueError", "parameter '0.weight': expected a tensor with data, found"),
    "predict complex": ("ValueError", "parameter '0.weight': expected real numbers, found torch."),
    "predict nobody": ("ValueError", "parameter '0.weight': expected a neuron or more on each si"),
    "predict without computing": ("ValueError", "expected a module with parameters, found none"),
    "double": ("ValueError", "INRs: expected torch.float32 on cpu, as the model is, found torch.f"),
    "half": ("ValueError", "INRs: expected torch.float32 on cpu, as the model is, found torch.flo"),
    "one of two is double": ("ValueError", "INRs: expected torch.float32 on cpu, as the model is"),
    "on meta": ("ValueError", "INRs: expected torch.float32 on cpu, as the model is, found torch."),
    "integers": ("ValueError", "INRs: expected torch.float32 on cpu, as the model is, found torch"),
    "nothing among networks": ("TypeError", "INR 1: expected a module, found NoneType None"),
    "lazy among networks": ("ValueError", f"INR 0, parameter '0.weight': {UNINITIALISED}"),
}


@pytest.fixture(scope="module")
def found():
    """What each case came to: the type of an error, and what it says."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CASES], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", EXPECTED)
def test_it_is_told_what_was_expected_and_what_was_found(case, found):
    kind, text = found[case]
    expected, beginning = EXPECTED[case]
    assert kind == expected, text
    assert text.startswith(beginning)
    assert len(text) < 500


def test_all_cases_are_looked_at(found):
    assert found.keys() == EXPECTED.keys()
