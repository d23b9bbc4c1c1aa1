"""What kind of network a network is, so that a predictor can say what it has never seen."""

from collections.abc import Iterable, Mapping
from typing import Any

from l2o_graph.layout.spec import NetSpec

# Of each what a network has, as numbers, of which a range is seen, or as names.
RANGES = ("depth", "width", "kernel", "inputs", "classes")
NAMES = ("activation", "operation")

Descriptors = dict[str, list[Any]]


def descriptors(spec: NetSpec) -> Descriptors:
    """Of one network.

    Returns:
        "depth", hidden layers; "width", their neurons; "kernel", sides; "inputs"; "classes";
        "activation", names, "none" for none; "operation", what joins neurons: a "sum" is a skip,
        a "norm" a norm, "something unknown" whatever could not be followed.
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
    """Of many: from the least to the greatest of numbers, and all names."""
    found: dict[str, set[Any]] = {key: set() for key in (*RANGES, *NAMES)}
    for spec in specs:
        for key, values in descriptors(spec).items():
            found[key].update(values)
    ends = {key: [min(found[key]), max(found[key])] for key in RANGES if found[key]}
    return ends | {key: sorted(found[key]) for key in NAMES}


def out_of_range(spec: NetSpec, seen: Mapping[str, Any]) -> list[str]:
    """In what a network lies outside of a span, in words; in nothing, none."""
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
