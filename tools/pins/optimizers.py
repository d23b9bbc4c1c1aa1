"""Steps of optimizers, and gradients of meta-training."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .find import Made, named
from .networks import NETWORKS, cnn

STEPS = 5
FAMILIES = ("regression", "cnn", "attention", "embedding", "recurrence")


def trained(
    network: str, dtype: torch.dtype, make: Callable[[nn.Module], torch.optim.Optimizer]
) -> list[Any]:
    """Parameters and state after some steps."""
    model, batch = NETWORKS[network]()
    model = model.to(dtype)
    batch = batch.to(dtype) if batch.is_floating_point() else batch
    optimizer = make(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    state = optimizer.state_dict()
    return [list(model.state_dict().values()), repr(state["param_groups"]), _flat(state["state"])]


def _flat(x: Any) -> Any:
    """State with numbers and texts as text, tensors as they are."""
    if isinstance(x, dict):
        return {k: _flat(v) for k, v in x.items()}
    return x if isinstance(x, Tensor | list | tuple) else repr(x)


def optimizer_pins() -> Made:
    """Steps of NGOptimizer with every packaged checkpoint, with the model and without."""
    from l2o_graph import NGOptimizer, list_checkpoints

    for checkpoint in list_checkpoints():
        for network in NETWORKS:
            for dtype in (torch.float32, torch.float64):
                for with_model in (True, False):

                    def make(model: nn.Module, c=checkpoint, w=with_model) -> Any:
                        parameters = model.named_parameters()
                        return NGOptimizer(parameters, checkpoint=c, model=model if w else None)

                    name = f"{checkpoint}-{network}-{dtype}-{with_model}"
                    yield name, lambda n=network, d=dtype, m=make: trained(n, d, m)
    yield "explain", _explained


def _explained() -> str:
    from l2o_graph import NGOptimizer

    model, batch = cnn()
    optimizer = NGOptimizer(model.parameters(), model=model, total_steps=9)
    model(batch).sum().backward()
    optimizer.step()
    return str(optimizer.explain())


def paper_pins() -> Made:
    """The paper's rule: steps, and both of its meta-gradients."""
    from l2o_graph import PaperOptimizer

    untrained, config, presets = named("untrained"), named("RuleConfig"), named("PAPER")
    for kind, preset in presets.items():
        for dtype in (torch.float32, torch.float64):
            for network in ("mlp", "cnn"):

                def make(model: nn.Module, p=preset, d=dtype) -> Any:
                    # The table of positions has 10,000 rows, which take most of the time.
                    rule = untrained(replace(p, layers=2), 0).to(d)
                    return PaperOptimizer(model.named_parameters(), checkpoint=rule)

                name = f"{kind}-{network}-{dtype}"
                yield name, lambda n=network, d=dtype, m=make: trained(n, d, m)
        for estimator in ("greedy", "through_time"):
            small = config(kind, hidden=8, layers=2, inner=8)
            yield f"{kind}-{estimator}", lambda s=small, e=estimator: _meta_gradient(s, e)


def _meta_gradient(config: Any, estimator: str) -> list[Any]:
    rule = named("untrained")(config, 0)
    for i, p in enumerate(rule.parameters()):  # heads are zero at first
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    task = named("get_task")("fmnist_sample:width=4,batch=8")
    task.load(None)
    problem = task.problem(1, torch.device("cpu"))
    losses = named(estimator)(rule, problem, 2)
    return [losses, [torch.empty(0) if p.grad is None else p.grad for p in rule.parameters()]]


def evolution_pins() -> Made:
    """A span of training of each family, its scores and the estimate of a gradient."""
    for family in FAMILIES:
        yield family, lambda f=family: _evolved(f)


def _evolved(family: str) -> list[Any]:
    controller = named("Controller")(named("ControllerConfig")(channels=2))
    config = controller.config
    weights = torch.cat([p.detach().flatten() for p in controller.parameters()])
    weights += 0.1 * torch.randn(weights.shape)
    noise = named("perturbations")(3, 2, len(weights))
    vectors = named("perturbed", "perturbations")(weights, noise, 0.1)
    course = named("start", "Course")(family, 7, 2, 6, True)
    losses = course.span(config, named("weights_from")(config, vectors), 4)
    estimate, difference = named("gradient", "perturbations")(
        named("score", "Course")(losses), noise
    )
    return [losses, estimate, difference, course.parameters, course.offsets]
