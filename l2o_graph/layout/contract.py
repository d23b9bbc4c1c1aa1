"""Removal of neurons that only pass on the values of others from a NetSpec."""

from dataclasses import replace

from l2o_graph.layout.spec import Kernel, NetSpec


def folded(spec: NetSpec) -> NetSpec:
    """Remove neurons that only pass on the values of others.

    A skip between unequal widths is a padding and a sum. The padding has neurons of its own, with
    a constant edge in and another one out, which are merged into one edge.
    """
    passing = next((z for z in range(len(spec.neurons)) if _passes_on(spec, z)), None)
    return spec if passing is None else folded(_without(spec, passing))


def _passes_on(spec: NetSpec, z: int) -> bool:
    """Return whether a set only adds up other neurons, one to one, and feeds such sums."""
    neurons = spec.neurons[z]
    around = [k for k in spec.kernels if z in (k.source, k.target)]
    return (
        neurons.role == "hidden"
        and not neurons.activation
        and all(bias.neurons != z for bias in spec.biases)
        and any(k.source == z for k in around)
        and all(_copies(spec, k) and k.source != k.target for k in around)
    )


def _copies(spec: NetSpec, kernel: Kernel) -> bool:
    """Return whether a kernel is a constant 1 that joins neurons one to one."""
    return kernel.parameter == len(spec.shapes) and kernel.grid[1:] == (1, 1)


def _without(spec: NetSpec, z: int) -> NetSpec:
    """Remove a set, and merge each kernel into it with each kernel out of it."""
    into = [k for k in spec.kernels if k.target == z]
    kernels: list[Kernel] = []
    for kernel in spec.kernels:
        if kernel.source == z:
            kernels += [joint for k in into for joint in _joints(k, kernel)]
        elif kernel.target != z:
            kernels.append(kernel)

    def number(n: int) -> int:
        return n - (n > z)

    return replace(
        spec,
        neurons=spec.neurons[:z] + spec.neurons[z + 1 :],
        kernels=tuple(
            replace(k, source=number(k.source), target=number(k.target)) for k in kernels
        ),
        biases=tuple(replace(b, neurons=number(b.neurons)) for b in spec.biases),
    )


def _joints(into: Kernel, out: Kernel) -> list[Kernel]:
    """Merge two one-to-one kernels over the neurons that they share, if there are any."""
    start = max(into.target_start, out.source_start)
    stop = min(into.target_start + into.grid[0], out.source_start + out.grid[0])
    if start >= stop:
        return []
    return [
        replace(
            out,
            source=into.source,
            grid=(stop - start, 1, 1),
            source_start=into.source_start + start - into.target_start,
            target_start=out.target_start + start - out.source_start,
        )
    ]
