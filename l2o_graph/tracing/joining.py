"""Merging of the structures that several calls or processes have traced."""

from collections.abc import Iterable
from dataclasses import replace

from l2o_graph.layout.spec import Bias, Kernel, NetSpec
from l2o_graph.tracing.builder import Builder, NodeSet, sides
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
            continue
        spec = known.spec
        if reading.placed > known.placed:
            spec = reading.spec
        elif not reading.placed <= known.placed:
            spec = _merged(known.spec, reading.spec)
        known = Reading(spec, known.used | reading.used, known.numbers | reading.numbers)
    return known


def _merged(one: NetSpec, other: NetSpec) -> NetSpec:
    """Merge two structures: sets that the same scalars connect are the same."""
    builder, count = Builder(one.names, one.shapes), len(one.neurons)
    sets = [*one.neurons, *other.neurons]
    parent = list(range(len(sets)))

    def find(s: int) -> int:
        while parent[s] != s:
            s = parent[s]
        return s

    uses = {_scalars(use): use for use in reversed((*one.kernels, *one.biases)) if _owns(one, use)}
    unfit: set[int] = set()  # sets with the same scalars that do not fit
    for use in (*other.kernels, *other.biases):
        mine = uses.get(_scalars(use)) if _owns(other, use) else None
        for (s, at, _), (t, there, _) in zip(sides(mine), sides(use), strict=True) if mine else ():
            a, b = find(s), find(t + count)
            if at != there or sets[a].size != sets[b].size:
                unfit |= {a, b}
            else:
                parent[max(a, b)] = min(a, b)

    roots = [s for s in range(len(sets)) if find(s) == s]
    place = {s: i for i, s in enumerate(roots)}
    index = [place[find(s)] for s in range(len(sets))]  # of each set in the merged structure
    builder.sets = [NodeSet(sets[s].name, sets[s].size, sets[s].role) for s in roots]
    for s, neurons in enumerate(sets):
        found = builder.sets[index[s]]
        found.activation = found.activation or neurons.activation
        if neurons.role != "hidden" and found.role != "input":
            found.role = neurons.role
    builder.fix_order(index[s] for s in unfit)
    seen: set[Kernel | Bias] = set()
    for spec, first in ((one, 0), (other, count)):
        for kernel in spec.kernels:
            new = replace(
                kernel, source=index[kernel.source + first],
                target=index[kernel.target + first], again=False,
            )  # fmt: skip
            if new not in seen and not _is_self_loop(spec, new):
                builder.add_kernel(new)
            seen.add(new)
        for bias in spec.biases:
            on = replace(bias, neurons=index[bias.neurons + first], again=False)
            if on not in seen:
                builder.add_bias(on)
            seen.add(on)
    outputs = [
        index[s]
        for s, neurons in enumerate(sets)
        if neurons.role == builder.sets[index[s]].role == "output"
    ]
    return builder.spec(outputs)


def _owns(spec: NetSpec, use: Kernel | Bias) -> bool:
    return not use.again and not spec.is_constant(use.parameter)


def _scalars(use: Kernel | Bias) -> tuple:
    """Return the scalars of a kernel or a bias, and their layout."""
    if isinstance(use, Bias):
        return use.parameter, use.start, use.size
    return use.parameter, use.start, use.grid, use.positions, use.from_rows


def _is_self_loop(spec: NetSpec, kernel: Kernel) -> bool:
    """Return whether a constant connects each neuron to itself, after sets were merged."""
    same = (kernel.source, kernel.source_start) == (kernel.target, kernel.target_start)
    return same and spec.is_constant(kernel.parameter) and kernel.grid[1:] == (1, 1)
