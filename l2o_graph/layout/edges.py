"""States of the edges of blocks, and terms of nodes spread over them."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from l2o_graph.layout.blocks import Chunk

LazyEdges = Callable[[Chunk], Float[Tensor, "*B P E H"]]


def over_edges(
    chunk: Chunk,
    target_term: Float[Tensor, "*B N H"],
    source_term: Float[Tensor, "*B N H"],
) -> list[Float[Tensor, "*B _ H"]]:
    """For each block, a term of the node an edge leads to plus a term of the node it leaves."""
    answer = []
    for block in chunk:
        groups, rows, columns = block.grid
        terms = (source_term, target_term) if block.from_rows else (target_term, source_term)
        of_rows = terms[0][..., slice(*block.rows), :].unflatten(-2, (groups, rows, 1))
        of_columns = terms[1][..., slice(*block.columns), :].unflatten(-2, (groups, 1, columns))
        answer.append((of_rows + of_columns).flatten(-4, -2))
    return answer


def over_planes(
    chunk: Chunk,
    target_term: Float[Tensor, "*B N H"],
    source_term: Float[Tensor, "*B N H"],
    planes: int = 2,
) -> Float[Tensor, "*B P E H"]:
    """``over_edges`` for the forward edges and, with two planes, for their reverses."""
    forward, reverse = (target_term, source_term), (source_term, target_term)
    to, of = (torch.stack(terms[:planes], dim=-3) for terms in zip(forward, reverse, strict=True))
    pieces = over_edges(chunk, to, of)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-2)
