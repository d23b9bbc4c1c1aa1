"""The structure of the network that is trained: from calls of its model, or inferred."""

import gc
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import GeneratorType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from l2o_graph.layout.spec import NetSpec
from l2o_graph.optim.examples import Examples
from l2o_graph.optim.warn import warn
from l2o_graph.optim.watching import Watching, of_all_ranks
from l2o_graph.tracing.by_order import spec_of_module, spec_of_parameters

if TYPE_CHECKING:  # whoever gives no model does not need it
    from l2o_graph.tracing.network import Reading


class Structure:
    """What an optimizer knows of how its parameters join.

    With a model, calls of it are watched until all of its parameters were seen at work. Without
    one, the structure is inferred from order, shapes and names of the parameters.

    Args:
        owner: Name of the optimizer's type, for warnings.
        model: The network that is trained.
        examples: Counter of what it is trained on.
        is_given: Whether a user gave the model, who then hears what is not known of it. One that
            was found is dropped without a word where it proves not to be what is trained.
    """

    def __init__(
        self,
        owner: str,
        model: nn.Module | None,
        examples: Examples | None = None,
        is_given: bool = True,
    ):
        self.owner, self.model, self.examples, self.is_given = owner, model, examples, is_given
        self.shards: Any = None  # ranks that parameters are sharded over, where they are
        self.watching: Watching | None = None  # hooks on the model, while its calls are watched
        self._counting: Watching | None = None  # hooks that count examples, and nothing else
        self._known: Reading | None = None
        self._news: list[Reading] = []
        self._warned: set[str] = set()  # names of parameters that a warning was about
        self._asked: set[int] = set()  # parameters that calls were watched for once more
        self._group: Any = None  # ranks that train the model together, once a call showed them
        self.forget()

    def forget(self) -> None:
        """Drop the structure; the next step finds it anew."""
        self.spec: NetSpec | None = None  # what was asked for last
        self._agreed = False  # with the other ranks
        self._renew()

    def replaced(self, trained: Collection[Tensor]) -> list[Tensor]:
        """Those of an optimizer's parameters that the model has others for by now.

        None where any of these is not trained though it has a gradient, which is a mistake.
        """
        known = set() if self.model is None else {*self.model.parameters()}
        if not known or any(p.grad is not None and p not in trained for p in known):
            return []
        return [p for p in trained if p not in known]

    def copy(self) -> "Structure":
        """Copy what calls have told, for a copy or a pickle of the optimizer; nothing watches.

        A model that nobody gave stays behind: who copies an optimizer does not expect one.
        """
        model = self.model if self.is_given else None
        new = Structure(self.owner, model, self.examples, self.is_given)
        new._known, new._warned = self._known, set(self._warned)
        return new

    @property
    def traced(self) -> NetSpec | None:
        """The structure as far as calls of the model told it."""
        return None if self._known is None else self._known.spec

    @property
    def is_complete(self) -> bool:
        """Whether calls have shown what all parameters of the model do."""
        return self._known is not None and self._known.is_complete

    def _renew(self) -> None:
        """Watch the next calls of a model that has changed: they tell how."""
        if self.model is None or self.traced is None:
            return
        parameters = [*self.model.parameters()]
        if any(map(is_lazy, parameters)) or self.traced.shapes != shapes_of(parameters):
            self._known = None
            self._agreed = False
            self._asked.clear()
            self.watch()

    def watch(self) -> None:
        """Watch calls of the model, until all of its parameters were seen at work."""
        if self.model is not None and self.watching is None:
            self._put_hooks(structure=not self.is_complete)

    def drop(self) -> None:
        """Go on without the model, as it is not what is trained or nobody calls it."""
        for watching in (self.watching, self._counting):
            if watching is not None:
                watching.give_up()
        self.model = self.watching = self._counting = None
        self.forget()

    def _put_hooks(self, structure: bool) -> None:
        """Put other hooks on the model: for its structure and examples, or for these alone."""
        assert self.model is not None
        for old in (self.watching, self._counting):
            if old is not None:
                old.leave()
        counts = self.examples is not None and not self.examples.is_over
        self.watching = Watching(self.model, self, self.examples) if structure else None
        alone = counts and not structure
        self._counting = Watching(self.model, None, self.examples) if alone else None

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> None:
        """Follow the model through a batch, of which nothing remains."""
        from l2o_graph.tracing.network import read

        if self.model is None:
            raise RuntimeError(
                f"{self.owner}: expected a model to read, found parameters alone; give model="
            )
        try:
            self._news.append(read(self.model, args, kwargs))
        except Exception as error:  # training can go on without, and the model may say more
            self._warn_inferred(f"could not follow the model ({error!r})")
            return
        self._learn(self._news)

    def hear(self, reading: "Reading") -> None:
        """Take what a call of the model told."""
        self._news.append(reading)
        replicas = self._group or (self.watching and self.watching.group)
        if not replicas:  # else all of them learn it together
            self._learn(self._news)

    def _learn(self, readings: Sequence["Reading"]) -> None:
        """Learn what calls of the model told, here or in other processes."""
        self._news = []
        if not readings:
            return
        from l2o_graph.tracing.joining import all_of

        before = [] if self._known is None else [self._known]
        after = all_of([*before, *readings])
        if after is not None and (self._known is None or after.spec != self._known.spec):
            self.spec = None
        self._known = after

    def settle(self, gradient_of: Mapping[Tensor, Tensor]) -> None:
        """Before a step: learn what was seen since the last one, and see to what was not.

        Replicas of DistributedDataParallel learn what any of them saw, at their first step and
        whenever a gradient comes of a parameter that none has seen at work. They have the same
        gradients, and so ask each other at the same steps.
        """
        watching = self.watching
        if self.model is None or (watching is None and self.is_complete):
            return
        group = None
        if watching is not None:
            watching.stop()
            group = watching.group
        self._group = group or self._group
        if self._group is None:
            self._learn(self._news)
        unseen = self._unseen(gradient_of)
        if self._group is not None and (not self._agreed or unseen):
            if not self._agreed and self._known is not None:  # seen by this rank alone
                self._news.insert(0, self._known)
                self._known = None
            self._learn(of_all_ranks(self._news, self._group))
            self._agreed = True
            unseen = self._unseen(gradient_of)
        if not (self.is_given or self._known or (watching is not None and watching.was_called)):
            self.drop()
            return
        done = self.is_complete
        tired = watching is not None and watching.is_tired() and not unseen
        # Of other inputs or another mode than what was watched.
        again = set() if done else unseen - self._asked
        self._asked |= again
        # Hooks that were compiled with the model, and saw nothing, stay: with others it would be
        # compiled anew.
        stay = watching is not None and watching.was_compiled and self._known is None
        if (done or tired or again) and (again or watching is not None) and not stay:
            self._put_hooks(structure=bool(again))
        if watching is not None and self.watching is not None:
            self.watching.was_compiled = watching.was_compiled
            self.watching.was_sharded = watching.was_sharded
        self._warn_of_unknown()

    def _unseen(self, gradient_of: Mapping[Tensor, Tensor]) -> set[int]:
        """Parameters of the model that have a gradient, though no call has shown them at work."""
        assert self.model is not None
        used = frozenset() if self._known is None else self._known.used
        return {
            i for i, p in enumerate(self.model.parameters()) if i not in used and p in gradient_of
        }

    def _warn_of_unknown(self) -> None:
        """Warn of parameters whose work is not understood, once each."""
        names = [] if self._known is None else self._known.unknown
        new = [name for name in names if name not in self._warned]
        if new and self.is_given:
            from l2o_graph.tracing.network import unknown_message

            self._warned.update(new)
            warn(unknown_message(new))

    def network(
        self, trained: Sequence[Tensor], names: list[str] | None
    ) -> tuple[Sequence[Tensor], NetSpec]:
        """Find the parameters of the graph and how they join, inferred where nothing tells it.

        ``trained`` are those of the optimizer, ``names`` theirs, where all have one.
        """
        if self._group is None:
            self._learn(self._news)
        parameters = trained if self.model is None else [*self.model.parameters()]
        # What has no shape yet is refused by what reads it, in words of its own.
        if self.spec is None or self.spec.shapes != shapes_of(parameters):
            if self.model is None:
                self.spec = self.traced  # of the model of the optimizer that this is a copy of
                if self.spec is None or self.spec.shapes != shapes_of(parameters):
                    self.spec = spec_of_parameters(parameters, names)
            else:
                self._renew()
                self.spec = self.traced or self._spec_by_order(self.model)
        return parameters, self.spec

    def _spec_by_order(self, model: nn.Module) -> NetSpec:
        """The structure of a model that was not seen computing anything."""
        spec = spec_of_module(model)
        if self.watching is not None and self.watching.was_compiled:
            self._warn_inferred(
                "the model was called compiled, and what is compiled cannot be followed (give the "
                "compiled module itself as model=)"
            )
        elif self.watching is not None and self.watching.was_sharded:
            self._warn_inferred(
                "the model computes with sharded tensors, as tensor parallelism does, and these "
                "cannot be followed"
            )
        elif spec.loose:
            self._warn_inferred(
                "the model was not called before this step",
                f", which leaves {len(spec.loose)} of {len(spec.shapes)} parameters to their own "
                "features",
            )
        return spec

    def _warn_inferred(self, why: str, but: str = "") -> None:
        if not self.is_given:
            return
        said = "its structure is inferred from the order of its layers"
        warn(f"{self.owner}: {why}; {said}{but}")


def asked_of(params: object) -> nn.Module | None:
    """The module of which ``parameters()`` or ``named_parameters()`` are given, if they are.

    Or some of them, by ``filter`` or an expression. These are generators, which know what they go
    through and what they were called with until they end.
    """
    if isinstance(params, filter):
        inside = [x for x in gc.get_referents(params) if isinstance(x, GeneratorType)]
        return asked_of(inside[0]) if inside else None
    frame = params.gi_frame if isinstance(params, GeneratorType) else None
    if frame is None:
        return None
    if frame.f_code.co_name == "<genexpr>":
        return asked_of(frame.f_locals.get(".0"))
    if frame.f_code.co_name not in ("parameters", "named_parameters"):
        return None
    module = frame.f_locals.get("self")
    is_fit = isinstance(module, nn.Module) and not isinstance(module, torch.jit.ScriptModule)
    return module if is_fit else None


def shapes_of(parameters: Iterable[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Shapes as a network's specification has them."""
    return tuple(tuple(p.shape) for p in parameters)
