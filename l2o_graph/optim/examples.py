"""Counting the distinct examples that a network is trained on, from the rows of its inputs.

Gradient noise of a few examples, which training soon fits, looks like noise of always new ones;
the inputs show the difference.
"""

import functools
import math
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Number of distinct examples between few and many: 300 for each number in an example, up to 32
# numbers. With fewer than 10 numbers it falls with their square: these are mostly coordinates of a
# field, all of whose points are to be fitted.
MANY_PER_NUMBER, MOST_NUMBERS, OF_COORDINATES = 300, 32, 10
# Counting stops at this many times that number.
CLEARLY_MANY = 8
# The table is evaluated anew once rows have grown by this fraction: ε changes slowly.
LOOKED_AFTER = 1 / 16
# An integer, the index of a token or a category, counts as this many numbers.
NUMBERS_OF_INDEX = 8
# Fewer than about this many are meant to be memorised, like the single batch of a trial run.
BY_HEART = 64
# Of more examples than this many for each of its parameters a network memorises hardly any.
PER_PARAMETER = 8
# Size of the hash table that counts distinct rows.
MARKS = 2**14
# Only about this many numbers of longer rows are hashed, evenly spaced.
MOST_LOOKED_AT = 4096
# Integer types by size in bytes, for the bits of a number.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Examples:
    """Counter of the rows that a network is trained on, and of the distinct rows among them.

    Each row marks one place of a table, by a hash of all its bits. If E of K places are free,
    there were about K log(K / E) distinct rows (linear counting, Whang et al. 1990). Counting
    stops once they are clearly many, and if several processes train together, as none sees all.
    """

    def __init__(self):
        self.rows = self.numbers = 0  # rows so far, and numbers in each of them
        self.parameters = math.inf  # scalars that are trained, once they are known
        self.marks: Tensor | None = None  # (K,) 1 where a row has left its mark
        self.is_over = False  # whether counting has stopped
        self._looked = 0  # rows when the table was last evaluated
        self._few: Tensor | None = None  # () ε at that time
        self._last: weakref.ref[Tensor] | None = None

    @torch.no_grad()
    def see(self, inputs: Any) -> None:
        """Count the rows of the inputs of a call, once for each step.

        The first tensor of the inputs determines the number of rows; other tensors with as many
        rows belong to it.
        """
        tensors = [t for t in _tensors(inputs) if t.dim() and t.numel()]
        if self.is_over or not tensors:
            return
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.is_over = True
            return
        first = tensors[0]
        if self._last is not None and self._last() is first:
            return  # a nested call, or a second call with the same batch
        self._last = weakref.ref(first)
        rows = [t for t in tensors if len(t) == len(first) and t.device == first.device]
        if self.marks is None or self.marks.device != first.device:
            new = torch.zeros(MARKS, dtype=torch.uint8, device=first.device)
            self.marks = new if self.marks is None else self.marks.to(first.device)
        self.marks[_places([_numbers(t) for t in rows])] = 1
        self.rows += len(first)
        self.numbers = sum(map(numbers_of, rows))
        if self.rows >= self._looked * (1 + LOOKED_AFTER) or self._few is None:
            different = self._different()
            self._looked = self.rows
            self._few = fewness(different, self.rows, self.numbers, self.parameters)
            self.is_over = bool(different > CLEARLY_MANY * many(self.numbers))

    def few(self) -> Tensor | None:
        """Return the degree to which examples are few, see ``fewness``; None if not known."""
        return None if self.is_over else self._few

    def end_step(self) -> None:
        """End a step, so that the next call is counted even if its inputs are the same."""
        self._last = None

    def __str__(self) -> str:
        few = self.few()
        if few is None or few < 0.01:
            return ""
        return (
            f"about {round(float(self._different()))} distinct examples, {self.rows} seen: few "
            f"({float(few):.2f} of 1), so weight decay is stronger"
        )

    def _different(self) -> Tensor:
        """Estimate the number of distinct rows, at least 1."""
        assert self.marks is not None
        free = (MARKS - self.marks.sum()).clamp(min=1)
        return (MARKS * (math.log(MARKS) - free.float().log())).clamp(min=1)

    def state(self) -> dict[str, Any]:
        """Return the count as numbers and a tensor, to save it."""
        names = ("rows", "numbers", "parameters", "is_over", "marks")
        kept = {name: getattr(self, name) for name in names}
        return kept | {"looked": self._looked, "few": self._few}

    @staticmethod
    def of(state: Any) -> "Examples":
        """Restore a count from the result of ``state``; a new one for None.

        Raises:
            ValueError: For an invalid state.
        """
        new = Examples()
        if state is None:
            return new
        try:
            new.rows, new.numbers = int(state["rows"]), int(state["numbers"])
            new.parameters = float(state.get("parameters", math.inf))
            new.is_over, new._looked = bool(state["is_over"]), int(state["looked"])
            if state["marks"] is not None:
                new.marks = state["marks"].to(torch.uint8, copy=True).reshape(MARKS)
            if state.get("few") is not None:
                new._few = state["few"].clone().reshape(())
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"state_dict: expected a count of examples under 'examples', found {error!r}"
            ) from error
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}


def numbers_of(rows: Tensor) -> int:
    """Count the numbers of each row of a tensor, (B, *)."""
    each = 1 if rows.is_floating_point() or rows.is_complex() else NUMBERS_OF_INDEX
    return each * rows[0].numel()


def many(numbers: int) -> float:
    """Number of distinct examples, of ``numbers`` numbers each, between few and many."""
    return MANY_PER_NUMBER * min(numbers, MOST_NUMBERS) * min(numbers / OF_COORDINATES, 1.0)


def fewness(different: Tensor, rows: int, numbers: int, parameters: float) -> Tensor:
    """Compute the degree ε to which examples are few, from 0 to 1.

    It is the cube of the fraction of repeated rows, reduced if the distinct ones are many, too many
    for the network to memorise, or so few that they are meant to be memorised.

    Args:
        different: Number of distinct rows, at least 1.
        rows: Number of rows.
        numbers: Numbers in a row.
        parameters: Number of scalars that are trained; infinity if not known.
    """
    # Cubed, as what was seen two or three times is not overfitted yet.
    again = (1 - different / rows).clamp(min=0) ** 3
    for_network = 1 + (different / (PER_PARAMETER * parameters)) ** 2
    by_heart = 1 + (BY_HEART / different) ** 2
    return again / (1 + different / many(numbers)) / for_network / by_heart


def _tensors(inputs: Any) -> Iterator[Tensor]:
    """Yield the plain tensors among the inputs of a call, in order."""
    if type(inputs) in (Tensor, torch.nn.Parameter):
        plain = inputs.layout == torch.strided and not inputs.is_nested and not inputs.is_meta
        if plain and not inputs.is_quantized:
            yield inputs
    elif isinstance(inputs, Mapping):
        yield from _tensors(list(inputs.values()))
    elif isinstance(inputs, list | tuple):
        for one in inputs:
            yield from _tensors(one)
    elif hasattr(inputs, "__dict__") and not isinstance(inputs, Tensor | torch.nn.Module | type):
        inside = vars(inputs).values()  # a batch as an object
        yield from _tensors([x for x in inside if isinstance(x, Tensor | Mapping)])


def _numbers(x: Tensor) -> Tensor:
    """View the bits of each row's numbers as integers: (B, *) -> (B, n)."""
    x = x.detach()
    count = x[0].numel()
    each = -(-count // MOST_LOOKED_AT)
    if each == 1 or x.is_contiguous():
        x = x.reshape(len(x), -1)[:, ::each]
    else:  # for example channels_last, where a copy in another order would take long
        places = torch.arange(0, count, each, device=x.device)
        x = x[(slice(None), *torch.unravel_index(places, x.shape[1:]))]
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj()).flatten(1)
    if x.is_floating_point():
        x = x.contiguous().view(INTEGERS[x.element_size()])
    return x.long()


def _places(rows: list[Tensor]) -> Tensor:
    """Hash the integers of each row to a place in the table: (B, n) each -> (B,).

    The hash is the highest bits of a sum with random odd weights modulo 2^64. Unlike a sum of
    floats it does not depend on the order of additions.
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
