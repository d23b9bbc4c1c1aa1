"""The table of ``explain()``: kind, direction and step length of each parameter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from l2o_graph.layout.spec import NetSpec
from l2o_graph.optim.blocks import MATRICES, Block, blocks_of
from l2o_graph.optim.sharded import whole
from l2o_graph.optim.whitening import sides

TITLES = ("parameter", "shape", "kind", "direction", "step length", "of weights")


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the table: one parameter."""

    name: str
    shape: tuple[int, ...]
    kind: str  # role in the network
    direction: str  # how the direction of its updates is computed
    step_length: float | None  # RMS of its last update; None before the first
    of_weights: float | None  # RMS of its last update relative to that of its weights

    def cells(self) -> tuple[str, ...]:
        """Format the entry as text."""
        shape = " x ".join(map(str, self.shape)) or "scalar"
        length = "" if self.step_length is None else f"{self.step_length:.2e}"
        share = "" if self.of_weights is None else f"{100 * self.of_weights:.3g} %"
        return self.name, shape, self.kind, self.direction, length, share


@dataclass(frozen=True, slots=True)
class Account:
    """Entries of all parameters, in order; prints as a table with a note below it."""

    entries: tuple[Entry, ...]
    note: str

    def __str__(self) -> str:
        rows = [TITLES, *(entry.cells() for entry in self.entries)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(TITLES))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join(line.rstrip() for line in [*lines, *filter(None, [self.note])])

    def _repr_html_(self) -> str:
        def row(tag: str, cells: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in cells) + "</tr>"

        body = "".join(row("td", entry.cells()) for entry in self.entries)
        return f"<table>{row('th', TITLES)}{body}</table>{self.note}"


def account_of(
    spec: NetSpec,
    parameters: Sequence[Tensor],
    updates_of: Callable[[Tensor], Sequence[Tensor]],
    note: str,
) -> Account:
    """Tabulate all parameters of a network; ``updates_of`` gives the last update of each."""
    blocks: dict[int, list[Block]] = {}
    for block in blocks_of(spec):
        blocks.setdefault(block.parameter, []).append(block)
    entries = []
    for i, p in enumerate(parameters):
        found = blocks.get(i, [])
        length = _rms(updates_of(p))
        weights = _rms([whole(p)])
        share = length / weights if length is not None and weights else None
        entries.append(
            Entry(spec.names[i], tuple(p.shape), _kind(found), _direction(found), length, share)
        )
    return Account(tuple(entries), note)


def _rms(tensors: Sequence[Tensor]) -> float | None:
    count = sum(t.numel() for t in tensors)
    if not count:
        return None
    return (sum(float(t.double().square().sum()) for t in tensors) / count) ** 0.5


def _kind(blocks: Sequence[Block]) -> str:
    if not blocks:
        return "empty"
    names = {"first": "first kernel", "hidden": "kernel", "last": "last kernel"}
    kind = names.get(blocks[0].kind, blocks[0].kind)
    groups = blocks[0].matrix[0]
    if len(blocks) > 1:
        return f"{kind}, {len(blocks)} in one"
    return f"{kind}, {groups} groups" if groups > 1 else kind


def _direction(blocks: Sequence[Block]) -> str:
    if not blocks:
        return "none"
    block = blocks[0]
    _, r, c = block.matrix
    both = sides(r, c, block.stored[3]) if block.kind in MATRICES else ()
    found = [
        f"{side.blocks} x {side.length}" if side.blocks > 1 else str(side.length)
        for side in both
        if side is not None
    ]
    if not found:
        return "elementwise"
    return f"whitened{' on one side' if len(found) == 1 else ''}, {' by '.join(found)}"
