"""NeuralGraph, and how a network or its parameters become one."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.blocks import topology_of
from l2o_graph.layout.spec import CONSTANTS, Bias, Kernel, NetSpec
from l2o_graph.tracing import spec_of_computation
from l2o_graph.tracing.by_order import spec_of_module, spec_of_parameters
from l2o_graph.tracing.checks import (
    check_module,
    check_parameter,
    named_parameters,
    parameters_of,
    shown,
)

if TYPE_CHECKING:  # a slow import, and only the exchange needs it
    import torch_geometric.data


@dataclass(frozen=True, slots=True)
class NeuralGraph:
    """Network as a graph: F features for each of its P scalars, in torch's memory layout.

    Attributes:
        spec: Specification of the network: its neurons, and which parameter joins which.
        values: Features (F, P), parameters in the order of ``spec``, each contiguous. Those of a
            kernel are edge features, those of a bias node features.
    """

    spec: NetSpec
    values: Float[Tensor, "F P"]

    def parameter(self, index: int) -> Tensor:
        """Return the features of one parameter, (F, *shape), a view of ``values``."""
        shape = self.spec.shapes[index]
        start = topology_of(self.spec).parameter_start[index]
        return self.values[:, start : start + math.prod(shape)].view(-1, *shape)

    def parameters(self) -> list[Tensor]:
        """Return the first feature of each parameter in its shape: the weights, if unchanged."""
        return [self.parameter(i)[0] for i in range(len(self.spec.shapes))]

    def scalars(self, of: Kernel | Bias) -> Float[Tensor, "F n"]:
        """Return the features of a kernel or a bias of ``spec``, (F, n).

        For a constant, the first feature is its value and the others are 0.
        """
        if self.spec.is_constant(of.parameter):
            first = torch.arange(len(self.values), device=self.values.device) == 0
            value = CONSTANTS[of.parameter - len(self.spec.shapes)] * first.to(self.values)
            return value[:, None].expand(-1, of.size)
        start = topology_of(self.spec).first_scalar(of)
        return self.values[:, start : start + of.size]

    @staticmethod
    def batch(graphs: "Sequence[NeuralGraph]") -> "NeuralGraph":
        """Join several networks, of any architectures, into one graph without edges between them.

        A model gives the same results for each network as for that network alone.

        Raises:
            ValueError: For no graphs, or different numbers of features.
        """
        found = sorted({len(graph.values) for graph in graphs})
        if len(found) != 1:
            raise ValueError(f"expected graphs with one number of features, found {found}")
        specs = [graph.spec for graph in graphs]
        return NeuralGraph(
            functools.reduce(NetSpec.beside, specs),
            torch.cat([graph.values for graph in graphs], dim=1),
        )

    def __str__(self) -> str:
        return f"NeuralGraph of {self.spec}"

    def draw(self, path: str | Path) -> None:
        """Save a picture as .png, .svg or .pdf: see ``l2o_graph.graph.picture``."""
        from l2o_graph.graph.picture import draw

        draw(self, path)

    def to_data(self) -> "torch_geometric.data.Data":
        """Export to torch-geometric.

        Returns:
            Data with ``x`` (N, F * B), bias features with B the largest number of biases of a
            node, padded with zeros; ``edge_index`` (2, 2E), forward edges kernel by kernel, then
            the same reversed; ``edge_attr`` (2E, F * K) with K the largest number of positions of
            a kernel, padded with zeros; ``activation`` (N,), numbered as in ``node_activations``;
            ``loose`` (F, L), parameters outside the graph; ``spec``, for ``from_data``.
        """
        from l2o_graph.graph.exchange import to_data

        return to_data(self)

    @staticmethod
    def from_data(data: "torch_geometric.data.Data") -> "NeuralGraph":
        """Import the result of ``to_data``, bit for bit; only forward edges are read.

        Raises:
            ValueError: If the data has no ``spec`` or does not fit it.
        """
        from l2o_graph.graph.exchange import from_data

        return from_data(data)


def neural_graph(
    network: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
    inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
) -> NeuralGraph:
    """Read a network as a graph with its weights as the only feature; print it to check it.

    Args:
        network: A module, or its ``parameters()`` or ``named_parameters()``.
        inputs: Example batch for the module: a tensor, positional or named arguments. The module
            is then called and its computation followed. Without a batch the structure is inferred
            from the order of the layers, which is right for a sequence of layers.

    Returns:
        Graph with one feature: detached copies of the weights, in the widest type found.

    Raises:
        ValueError: If there are no parameters, and for a lazy module that was not called yet.
        TypeError: For anything but a module or parameters, and for a TorchScript module.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> print(neural_graph(net, torch.zeros(1, 2)))
        NeuralGraph of 6 neurons, 9 edges, 13 parameters
          0.weight [3, 2]: input of 0 [2] -> 0 [3] relu
          0.bias [3]: bias of 0
          2.weight [1, 3]: 0 [3] relu -> 2 [1]
          2.bias [1]: bias of 2
    """
    if isinstance(network, nn.Module):
        check_module(network, "network")
        parameters, spec = parameters_of(network), None
        for name, p in named_parameters(network):
            check_parameter(p, f"parameter '{name}'")
        if parameters:
            spec = spec_of_module(network) if inputs is None else _followed(network, inputs)
    else:
        if not isinstance(network, Iterable) or isinstance(network, str | Mapping):
            raise TypeError(
                "network: expected a module, or its parameters() or named_parameters(), found "
                + shown(network)
            )
        parameters, names = [], []
        for item in network:
            name, parameter = item if isinstance(item, tuple) else (None, item)
            parameters.append(parameter)
            names += [] if name is None else [name]
        spec = spec_of_parameters(parameters, names or None)
    if spec is None:
        raise ValueError("expected a module with parameters, found none")
    return NeuralGraph(spec, torch.cat([p.detach().reshape(-1) for p in parameters])[None])


def _followed(module: nn.Module, inputs: Tensor | Sequence[Any] | Mapping[str, Any]) -> NetSpec:
    if not isinstance(inputs, Tensor | Mapping | Sequence) or isinstance(inputs, str):
        raise TypeError(
            "inputs: expected a tensor, the arguments or the named arguments of the module, found "
            + shown(inputs)
        )
    if isinstance(inputs, Mapping):
        return spec_of_computation(module, (), inputs)
    return spec_of_computation(module, (inputs,) if isinstance(inputs, Tensor) else inputs)
