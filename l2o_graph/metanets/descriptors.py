"""Traits of networks, by which a predictor warns of networks unlike its training set."""

from collections.abc import Iterable, Mapping
from typing import Any

from l2o_graph.layout.spec import NetSpec

# Traits that are numbers, with a range in the training set, and traits that are names.
RANGES = ("depth", "width", "kernel", "inputs", "classes")
NAMES = ("activation", "operation")

Descriptors = dict[str, list[Any]]


def descriptors(spec: NetSpec) -> Descriptors:
    """Collect the traits of one network.

    Returns:
        Values of "depth", the number of hidden layers; "width", numbers of their neurons;
        "kernel", sides; "inputs"; "classes"; "activation", names, or "none"; "operation", kinds of
        edges: "sum" for a skip, "norm", "something unknown" for what could not be followed.
    """
    hidden = [n for n in spec.neurons if n.role == "hidden"]
    kinds = {k.kind for k in spec.kernels}
    if spec.loose:
        kinds.add("something unknown")
    return {
        "depth": [max((n.depth + 1 for n in hidden), default=0)],
        "width": sorted({n.size for n in hidden}),
        "kernel": sorted({side for k in spec.kernels for side in k.positions}),
        "inputs": [sum(n.size for n in spec.neurons if n.role == "input")],
        "classes": [sum(n.size for n in spec.neurons if n.role == "output")],
        "activation": sorted({n.activation or "none" for n in hidden}),
        "operation": sorted(kinds),
    }


def ranges_of(specs: Iterable[NetSpec]) -> Descriptors:
    """Collect the ranges of numbers, and all names, over many networks."""
    found: dict[str, set[Any]] = {key: set() for key in (*RANGES, *NAMES)}
    for spec in specs:
        for key, values in descriptors(spec).items():
            found[key].update(values)
    ends = {key: [min(found[key]), max(found[key])] for key in RANGES if found[key]}
    return ends | {key: sorted(found[key]) for key in NAMES}


def out_of_range(spec: NetSpec, seen: Mapping[str, Any]) -> list[str]:
    """Describe the traits of a network outside the ranges ``seen``; empty if there are none."""
    answer = []
    for key, values in descriptors(spec).items():
        if key not in seen:
            continue
        if key in RANGES:
            least, most = seen[key]
            strange = [value for value in values if not least <= value <= most]
            known = f"{least} to {most}" if least < most else f"{least}"
        else:
            strange = [value for value in values if value not in seen[key]]
            known = ", ".join(seen[key])
        if strange:
            answer.append(f"{key} {', '.join(map(str, strange))} (seen: {known})")
    return answer
