"""How many different examples a network is trained on, by the rows of what it is called with.

Gradients do not tell noise of few examples, which training soon fits, from noise of ever new ones.
What they are computed of does.
"""

import functools
import math
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# So many different examples are neither few nor many: for each number in an example, up to 32.
MANY_PER_NUMBER, MOST_NUMBERS = 96, 32
# Fewer than about these are there to be learned by heart, as the one batch of a trial is.
BY_HEART = 64
# Size of the table that different ones are counted with.
MARKS = 2**14
# Of longer rows, about so many numbers are looked at, evenly spaced.
MOST_LOOKED_AT = 4096
# Integers that hold the bits of a number of so many bytes.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Examples:
    """A count of the rows that a network was trained on, and of the different ones among them.

    Each row marks one place of a table, by a hash of all its bits. Where K places have E without a
    mark, there were about K log(K / E) different rows (linear counting, Whang et al. 1990). Once
    it is clear that they are many, nothing is counted any more, and so it is where several
    processes train together, as none of them sees all.
    """

    def __init__(self):
        self.rows = self.numbers = 0  # rows so far, and numbers in each of them
        self.marks: Tensor | None = None  # (K,) 1 where a row has left its mark
        self.is_over = False  # whether nothing is counted any more
        self._looked = 0  # rows when the table was looked at last
        self._last: weakref.ref[Tensor] | None = None

    @torch.no_grad()
    def see(self, inputs: Any) -> None:
        """Count the rows of what a network is called with, once for each step.

        The first tensor among the inputs tells how many there are; those that have as many rows
        belong to it.
        """
        tensors = [t for t in _tensors(inputs) if t.dim() and t.numel()]
        if self.is_over or not tensors:
            return
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.is_over = True
            return
        first = tensors[0]
        if self._last is not None and self._last() is first:
            return  # the same call from within another, or another look at the batch
        self._last = weakref.ref(first)
        rows = [t for t in tensors if len(t) == len(first) and t.device == first.device]
        if self.marks is None or self.marks.device != first.device:
            new = torch.zeros(MARKS, dtype=torch.uint8, device=first.device)
            self.marks = new if self.marks is None else self.marks.to(first.device)
        self.marks[_places([_numbers(t) for t in rows])] = 1
        self.rows += len(first)
        self.numbers = sum(t[0].numel() for t in rows)
        clearly_many = 4 * many(self.numbers)
        if self.rows - self._looked >= clearly_many:
            self._looked = self.rows
            self.is_over = bool(self._different() > clearly_many)

    def few(self) -> Tensor | None:
        """How far training is on few examples, see ``fewness``; None where it is not known."""
        if self.is_over or self.marks is None:
            return None
        return fewness(self._different(), self.rows, self.numbers)

    def end_step(self) -> None:
        """Count the next call, whatever it is called with."""
        self._last = None

    def __str__(self) -> str:
        few = self.few()
        if few is None or few < 0.01:
            return ""
        return (
            f"about {round(float(self._different()))} different examples, {self.rows} seen: few "
            f"({float(few):.2f} of 1), so that weights decay more"
        )

    def _different(self) -> Tensor:
        """About how many different rows there were; at least 1."""
        assert self.marks is not None
        free = (MARKS - self.marks.sum()).clamp(min=1)
        return (MARKS * (math.log(MARKS) - free.float().log())).clamp(min=1)

    def state(self) -> dict[str, Any]:
        """What goes on in another process: numbers and a tensor."""
        kept = {"rows": self.rows, "numbers": self.numbers, "is_over": self.is_over}
        return kept | {"looked": self._looked, "marks": self.marks}

    @staticmethod
    def of(state: Any) -> "Examples":
        """A count that goes on from what ``state`` answered; a new one where there is nothing.

        Raises:
            ValueError: For what is no such state.
        """
        new = Examples()
        if state is None:
            return new
        try:
            new.rows, new.numbers = int(state["rows"]), int(state["numbers"])
            new.is_over, new._looked = bool(state["is_over"]), int(state["looked"])
            if state["marks"] is not None:
                new.marks = state["marks"].to(torch.uint8, copy=True).reshape(MARKS)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"state_dict: expected a count of examples under 'examples', found {error!r}"
            ) from error
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}


def many(numbers: int) -> int:
    """How many different examples are neither few nor many, of so many numbers each."""
    return MANY_PER_NUMBER * min(numbers, MOST_NUMBERS)


def fewness(different: Tensor, rows: int, numbers: int) -> Tensor:
    """How far training is on few examples, from 0 to 1.

    The part of rows that were seen before, for a number of different ones, at least 1, that is
    between what is learned by heart and what is many.
    """
    again = (1 - different / rows).clamp(min=0)
    return again / (1 + (different / many(numbers)) ** 2) / (1 + (BY_HEART / different) ** 2)


def _tensors(inputs: Any) -> Iterator[Tensor]:
    """Plain tensors among what a network is called with, in order."""
    if type(inputs) in (Tensor, torch.nn.Parameter):
        plain = inputs.layout == torch.strided and not inputs.is_nested and not inputs.is_meta
        if plain and not inputs.is_quantized:
            yield inputs
    elif isinstance(inputs, Mapping):
        yield from _tensors(list(inputs.values()))
    elif isinstance(inputs, list | tuple):
        for one in inputs:
            yield from _tensors(one)


def _numbers(x: Tensor) -> Tensor:
    """The bits of the numbers of each row, as integers: (B, *) -> (B, n)."""
    x = x.detach()
    count = x[0].numel()
    each = -(-count // MOST_LOOKED_AT)
    if each == 1 or x.is_contiguous():
        x = x.reshape(len(x), -1)[:, ::each]
    else:  # channels_last, say, of which a copy in another order would take long
        places = torch.arange(0, count, each, device=x.device)
        x = x[(slice(None), *torch.unravel_index(places, x.shape[1:]))]
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj()).flatten(1)
    if x.is_floating_point():
        x = x.contiguous().view(INTEGERS[x.element_size()])
    return x.long()


def _places(rows: list[Tensor]) -> Tensor:
    """Place in the table of each row, by all of its integers: (B, n) each -> (B,).

    A sum with random odd weights modulo 2^64, of which the highest bits are taken: it does not
    depend on the order of additions, as one of floats would.
    """
    lengths = [x.shape[1] for x in rows]
    odd = _odd_weights(sum(lengths), rows[0].device).split(lengths)
    mixed = torch.stack([(x * w).sum(1) for x, w in zip(rows, odd, strict=True)]).sum(0)
    return (mixed >> (64 - MARKS.bit_length() + 1)) & (MARKS - 1)


@functools.lru_cache(maxsize=8)
def _odd_weights(count: int, device: torch.device) -> Tensor:
    draws = torch.Generator("cpu").manual_seed(0)
    found = torch.randint(-(2**62), 2**62, (count,), generator=draws, device="cpu")
    return (found * 2 + 1).to(device)
