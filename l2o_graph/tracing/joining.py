"""Merging of the structures that several calls or processes have traced."""

from collections.abc import Iterable
from dataclasses import replace

from l2o_graph.layout.spec import Bias, Kernel, NetSpec
from l2o_graph.tracing.builder import Builder, NodeSet
from l2o_graph.tracing.network import Reading


def all_of(readings: Iterable[Reading]) -> Reading | None:
    """Merge readings of one network; return None without any.

    A reading that places a superset of the parameters replaces earlier ones, and a reading that
    places a subset changes nothing. Otherwise, both structures are merged at common kernels.
    """
    known: Reading | None = None
    for reading in readings:
        if known is None or known.spec.shapes != reading.spec.shapes:
            known = reading
        elif reading.placed > known.placed:
            known = replace(reading, used=known.used | reading.used)
        elif reading.placed <= known.placed:
            known = replace(known, used=known.used | reading.used)
        else:
            spec = _joined(known.spec, reading.spec)
            known = Reading(spec, known.used | reading.used)
    return known


def _joined(one: NetSpec, other: NetSpec) -> NetSpec:
    """Merge two structures: sets that the same scalars connect are the same."""
    builder, count = Builder(one.names, one.shapes), len(one.neurons)
    sets = [*one.neurons, *other.neurons]
    stands_for = list(range(len(sets)))

    def of(s: int) -> int:
        while stands_for[s] != s:
            s = stands_for[s]
        return s

    uses = {_scalars(use): use for use in reversed((*one.kernels, *one.biases)) if _held(one, use)}
    apart: set[int] = set()  # sets with the same scalars that do not fit
    for use in (*other.kernels, *other.biases):
        mine = uses.get(_scalars(use)) if _held(other, use) else None
        for (s, at), (t, there) in zip(_ends(mine), _ends(use), strict=True) if mine else ():
            a, b = of(s), of(t + count)
            if at != there or sets[a].size != sets[b].size:
                apart |= {a, b}
            else:
                stands_for[max(a, b)] = min(a, b)

    place: dict[int, int] = {}
    for s in range(len(sets)):
        if of(s) == s:
            place[s] = len(builder.sets)
            builder.sets.append(NodeSet(sets[s].name, sets[s].size, sets[s].role))
    for s, neurons in enumerate(sets):
        found = builder.sets[place[of(s)]]
        found.activation = found.activation or neurons.activation
        if neurons.role != "hidden" and found.role != "input":
            found.role = neurons.role
    for s in apart:
        builder.sets[place[of(s)]].is_ordered = True
    seen: set[Kernel | Bias] = set()
    for spec, first in ((one, 0), (other, count)):
        for kernel in spec.kernels:
            new = replace(
                kernel, source=place[of(kernel.source + first)],
                target=place[of(kernel.target + first)], again=False,
            )  # fmt: skip
            if new not in seen and not _says_nothing(spec, new):
                builder.add_kernel(new)
            seen.add(new)
        for bias in spec.biases:
            on = replace(bias, neurons=place[of(bias.neurons + first)], again=False)
            if on not in seen:
                builder.add_bias(on)
            seen.add(on)
    outputs = [
        place[of(s)]
        for s, neurons in enumerate(sets)
        if neurons.role == "output" and builder.sets[place[of(s)]].role == "output"
    ]
    return builder.spec(outputs)


def _held(spec: NetSpec, use: Kernel | Bias) -> bool:
    return not use.again and not spec.is_constant(use.parameter)


def _scalars(use: Kernel | Bias) -> tuple:
    """Return the scalars of a kernel or a bias, and their layout."""
    if isinstance(use, Bias):
        return use.parameter, use.start, use.size
    return use.parameter, use.start, use.grid, use.positions, use.from_rows


def _ends(use: Kernel | Bias) -> list[tuple[int, int]]:
    """Return the sets of a kernel or a bias, and the first neuron of each."""
    if isinstance(use, Bias):
        return [(use.neurons, use.neurons_start)]
    return [(use.source, use.source_start), (use.target, use.target_start)]


def _says_nothing(spec: NetSpec, kernel: Kernel) -> bool:
    """Return whether a constant connects each neuron to itself, after sets were merged."""
    same = (kernel.source, kernel.source_start) == (kernel.target, kernel.target_start)
    return same and spec.is_constant(kernel.parameter) and kernel.grid[1:] == (1, 1)
