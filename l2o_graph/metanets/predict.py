"""predict_accuracy: any module that graphs cover, in one call."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2o_graph.metanets.cnn_body import GraphBody
from l2o_graph.metanets.descriptors import out_of_range
from l2o_graph.metanets.predictor import GeneralizationPredictor
from l2o_graph.metanets.structure import structure_of_module
from l2o_graph.tracing.checks import check_module, check_parameter


def predict_accuracy(
    module: nn.Module,
    batch: Tensor | Sequence[Any] | Mapping[str, Any],
    checkpoint: str | Path = "cnn-park",
) -> float:
    """Predict the test accuracy of a network from its weights alone.

    It is that on the dataset whose networks the checkpoint was trained on, and says nothing of
    networks trained on another. The network is followed through the batch, not evaluated on it,
    and not changed.

    Args:
        module: The network: convolutions, linear layers and what ``neural_graph`` follows else.
        batch: An example input, of any numbers: a tensor, the arguments, or the named arguments.
        checkpoint: A name of ``l2o_graph.cnn.list_cnn_models()``, or a path to a .safetensors
            file. "cnn-park" has seen small CNNs that were trained on CIFAR-10 of 16 x 16 pixels.

    Returns:
        The accuracy, from 0 to 1. For a network of another kind than the checkpoint has seen, of
        another depth or with another activation, a warning says in what.

    Raises:
        ValueError: For a kernel larger than the checkpoint has room for, by its parameter, for
            more inputs or outputs; for parameters that are complex, empty, without data, or not
            finite; for an unknown checkpoint, and one of a model that reads no graphs.
        TypeError: For what is no module, for one of TorchScript, and for no batch.
        FileNotFoundError: For a path to nothing.
    """
    check_module(module, "module")
    if batch is None:
        raise TypeError("batch: expected an example input, found None")
    model = GeneralizationPredictor.from_checkpoint(checkpoint)
    if not isinstance(model.body, GraphBody):
        raise ValueError(
            f"checkpoint '{checkpoint}': expected a model that reads any graph, found "
            f"'{model.config.model}'"
        )
    for name, p in module.named_parameters():
        _check_weights(name, p)
    training = {part: part.training for part in module.modules()}
    try:
        spec = structure_of_module(module.eval(), batch)  # a BatchNorm refuses batches of one else
    finally:
        for part, mode in training.items():
            part.training = mode
    weights = {
        k: p.detach().flatten().to("cpu", torch.float32) for k, p in module.named_parameters()
    }
    bad = [name for name, row in weights.items() if not bool(row.isfinite().all())]
    if bad:
        raise ValueError(f"network: expected finite weights, found others in {bad}")
    values = torch.cat(list(weights.values()))
    with torch.no_grad():
        accuracy = model.body.read_one(spec, values).sigmoid().item()
    strange = out_of_range(spec, model.provenance.get("seen", {}))
    if strange:
        warnings.warn(
            f"predict_accuracy: the network is unlike those that checkpoint '{checkpoint}' was "
            f"trained on: {'; '.join(strange)}",
            stacklevel=2,
        )
    return accuracy


def _check_weights(name: str, parameter: Tensor) -> None:
    """Raise for what a predictor cannot read."""
    check_parameter(parameter, f"parameter '{name}'")
    for wrong, expected, found in (
        (parameter.is_meta, "a tensor with data", "one on the meta device"),
        (parameter.is_complex(), "real numbers", parameter.dtype),
        (not parameter.numel(), "a neuron or more on each side", list(parameter.shape)),
    ):
        if wrong:
            raise ValueError(f"parameter '{name}': expected {expected}, found {found}")
