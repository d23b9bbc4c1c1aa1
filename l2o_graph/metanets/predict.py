"""predict_accuracy: the predicted accuracy of any module, in one call."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from l2o_graph.metanets.cnn_body import GraphBody
from l2o_graph.metanets.cnn_probes import CNNProbeBody
from l2o_graph.metanets.descriptors import out_of_range
from l2o_graph.metanets.intervals import AccuracyPrediction, interval_around
from l2o_graph.metanets.predictor import GeneralizationPredictor
from l2o_graph.metanets.structure import structure_of_module
from l2o_graph.tracing.checks import check_module, check_parameter

Batch = Tensor | Sequence[Any] | Mapping[str, Any]


@overload
def predict_accuracy(
    module: nn.Module, batch: Batch, checkpoint: str | Path = ..., interval: None = ...
) -> float: ...


@overload
def predict_accuracy(
    module: nn.Module, batch: Batch, checkpoint: str | Path = ..., *, interval: float
) -> AccuracyPrediction: ...


def predict_accuracy(
    module: nn.Module,
    batch: Batch,
    checkpoint: str | Path = "cnn-park",
    interval: float | None = None,
) -> float | AccuracyPrediction:
    """Predict the test accuracy of a network, without any image of its dataset.

    The prediction is for the dataset of the checkpoint's training networks, and means nothing for
    networks trained on another. The batch only serves to read the structure of the network, which
    is not changed. A checkpoint with probes also evaluates the network on images of its own, with
    the size and normalisation of its training networks' images.

    A warning names traits of the network outside the checkpoint's training set, such as its depth
    or activation, and a prediction outside the range of accuracies there.

    Args:
        module: Network of convolutions, linear layers and whatever else ``neural_graph`` follows.
        batch: Example input with arbitrary values: a tensor, positional or named arguments.
        checkpoint: A name of ``l2o_graph.cnn.list_cnn_models()``, or a path to a .safetensors
            file. "cnn-park" was trained on small CNNs for CIFAR-10 of 16 x 16 pixels.
        interval: Coverage of the prediction interval, such as 0.9; None for no interval. It holds
            on average over networks of training runs like those of the checkpoint.

    Returns:
        Accuracy, from 0 to 1; with ``interval`` an ``AccuracyPrediction`` (accuracy, low, high).

    Raises:
        ValueError: For a kernel, or a number of inputs or outputs, that exceeds the checkpoint's
            capacity; for a network that does not map images to logits, if the checkpoint has
            probes; for parameters that are complex, empty, without data, or not finite; for an
            interval that the checkpoint cannot give; for an unknown checkpoint, and one of a model
            that does not read arbitrary networks.
        TypeError: For anything but a module, for a TorchScript module, and without a batch.
        FileNotFoundError: For a path that does not exist.
    """
    check_module(module, "module")
    if batch is None:
        raise TypeError("batch: expected an example input, found None")
    model = GeneralizationPredictor.from_checkpoint(checkpoint)
    if not isinstance(model.body, GraphBody | CNNProbeBody):
        raise ValueError(
            f"checkpoint '{checkpoint}': expected a model that reads any network, found "
            f"'{model.config.model}'"
        )
    for name, p in module.named_parameters():
        _check_weights(name, p)
    weights = {
        k: p.detach().flatten().to("cpu", torch.float32) for k, p in module.named_parameters()
    }
    bad = [name for name, row in weights.items() if not bool(row.isfinite().all())]
    if bad:
        raise ValueError(f"network: expected finite weights, found others in {bad}")
    training = {part: part.training for part in module.modules()}
    try:
        module.eval()  # in training mode, BatchNorm refuses batches of one
        spec = structure_of_module(module, batch)
        with torch.no_grad():
            values = torch.cat(list(weights.values()))
            predicted = model.body.read_one(spec, values, module).sigmoid()
    finally:
        for part, mode in training.items():
            part.training = mode
    accuracy = predicted.item()
    seen = model.provenance.get("seen", {})
    strange = out_of_range(spec, seen)
    least, most = seen.get("accuracy", (0.0, 1.0))
    if not least <= accuracy <= most:
        strange.append(f"accuracy {accuracy:.1%} (seen: {least:.1%} to {most:.1%})")
    if strange:
        warnings.warn(
            f"predict_accuracy: the network is unlike those that checkpoint '{checkpoint}' was "
            f"trained on: {'; '.join(strange)}",
            stacklevel=2,
        )
    if interval is None:
        return accuracy
    residuals = model.provenance.get("residuals", {})
    low, high = interval_around(predicted, interval, residuals, f"checkpoint '{checkpoint}'")
    return AccuracyPrediction(accuracy, low.item(), high.item())


def _check_weights(name: str, parameter: Tensor) -> None:
    """Raise for a parameter that a predictor cannot read."""
    check_parameter(parameter, f"parameter '{name}'")
    for wrong, expected, found in (
        (parameter.is_meta, "a tensor with data", "one on the meta device"),
        (parameter.is_complex(), "real numbers", parameter.dtype),
        (not parameter.numel(), "a neuron or more on each side", list(parameter.shape)),
    ):
        if wrong:
            raise ValueError(f"parameter '{name}': expected {expected}, found {found}")
