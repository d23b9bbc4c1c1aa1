"""Models that read networks: those in the package, and untrained ones."""

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .find import Made, named


def sirens(count: int, layout: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """First weights of SIRENs, with biases."""
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    weights, biases = named("initialise")(generators, layout)
    return weights, [b + 0.01 * torch.randn(b.shape) for b in biases]


def cnns(count: int) -> Any:
    """CNNs of two architectures, drawn."""
    of = named("CNNArchitecture")
    architectures = (
        of((3, 4, 6), (3, 5), ("relu", "tanh"), (-1, -1), (1, 2)),
        of((3, 5, 7, 7), (3, 3, 1), ("gelu", "relu", "silu"), (-1, 0, 1), (1, 1, 1)),
    )
    which = torch.arange(count) % 2
    values = tuple(0.3 * torch.randn(architectures[i].num_parameters) for i in which.tolist())
    numbers = torch.arange(count)
    return named("CNNs")(architectures, which, values, torch.rand(count), numbers, numbers)


def reader_pins() -> Made:
    """Logits and gradients of the packaged readers of networks."""
    from l2o_graph.cnn import list_cnn_models
    from l2o_graph.inr import list_inr_models

    for name in list_inr_models():
        yield f"inr-{name}", lambda n=name: _inr_answers(named("load_inr_model")(n))
    for name in list_cnn_models():
        predictor = named("GeneralizationPredictor")
        yield f"cnn-{name}", lambda n=name, p=predictor: _cnn_answers(p.from_checkpoint(n))
    yield "predict_accuracy", _predicted


def _inr_answers(model: nn.Module) -> list[Any]:
    model.requires_grad_(True)
    answer = model(*sirens(3, tuple(model.config.layout)))
    parts = [answer] if isinstance(answer, Tensor) else [*answer[0], *answer[1]]
    sum(part.square().sum() for part in parts).backward()
    return [parts, _gradients(model), list(model.state_dict())]


def _cnn_answers(model: nn.Module) -> list[Any]:
    model.requires_grad_(True)
    logits = model.logits(cnns(5))
    logits.square().sum().backward()
    return [logits, _gradients(model), list(model.state_dict())]


def _gradients(model: nn.Module) -> list[Tensor]:
    return [torch.empty(0) if p.grad is None else p.grad for p in model.parameters()]


def _predicted() -> float:
    from l2o_graph import predict_accuracy

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )  # fmt: skip
    return float(predict_accuracy(model, torch.zeros(1, 3, 8, 8)))


def model_pins() -> Made:
    """Weights, answers and gradients of untrained models, for each configuration."""
    for model, task in named("SIZES", "INRModelConfig"):
        for changes in _inr_changes(model):
            name = f"inr-{model}-{task}-{changes}"
            yield name, lambda m=model, t=task, c=changes: _inr_model(m, t, c)
    for model, zoo in named("SIZES", "CNNModelConfig"):
        yield f"cnn-{model}-{zoo}", lambda m=model, z=zoo: _cnn_model(m, z)
    for kind, preset in named("PAPER").items():
        yield f"rule-{kind}", lambda p=preset: named("untrained")(p, 0).state_dict()
    for reader in ("none", "sequence", "mean", "messages", "attention"):
        for grain in ("tensor", "neuron"):
            yield f"controller-{reader}-{grain}", lambda r=reader, g=grain: _controller(r, g)


def _inr_changes(model: str) -> list[dict[str, Any]]:
    if model not in ("ng_gnn", "ng_t"):
        return [{}]
    return [{}, {"probes": 4, "reverse": True}, {"positions": False, "normalise": False}]


def _inr_model(model: str, task: str, changes: dict[str, Any]) -> list[Any]:
    config = named("inr_config")(model, task, layout=(2, 8, 8, 1), hidden=8, **changes)
    statistics = None
    if config.normalise:
        statistics = named("Statistics").neutral(len(config.layout) - 1)
    of = named("INRClassifier") if task == "classify" else named("INREditor")
    made = of(config, statistics)
    return [made.state_dict(), repr(config), _inr_answers(made)]


def _cnn_model(model: str, zoo: str) -> list[Any]:
    config = named("cnn_config")(model, zoo)
    config = replace(config, hidden=16) if model != "stat_nn" else config
    made = named("GeneralizationPredictor")(config)
    answers = _cnn_answers(made) if zoo == "park" else []
    return [made.state_dict(), json.dumps(config.to_json()), answers]


def _controller(reader: str, grain: str) -> dict[str, Tensor]:
    return named("Controller")(named("ControllerConfig")(reader, grain)).state_dict()
