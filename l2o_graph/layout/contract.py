"""NetSpec -> NetSpec without neurons that only pass on what others say."""

from dataclasses import replace

from l2o_graph.layout.spec import Kernel, NetSpec


def folded(spec: NetSpec) -> NetSpec:
    """Without neurons that only pass on what others say.

    A skip between unequal widths is a padding and a sum, and the padding has neurons of its own,
    with an edge 1 to lead there and another to lead on. What remains is one edge.
    """
    passing = next((z for z in range(len(spec.neurons)) if _passes_on(spec, z)), None)
    return spec if passing is None else folded(_without(spec, passing))


def _passes_on(spec: NetSpec, z: int) -> bool:
    """Whether a set of neurons only adds up some neurons, one by one, for other sums."""
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
    """Whether edges are ones that join neurons one by one."""
    return kernel.parameter == len(spec.shapes) and kernel.grid[1:] == (1, 1)


def _without(spec: NetSpec, z: int) -> NetSpec:
    """Whatever leads to a set joined to wherever that leads."""
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
    """The edges past the neurons that two rows of ones have in common, if there are any."""
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
