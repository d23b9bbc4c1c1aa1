"""The structure of the trained network: read from calls of its model, or inferred."""

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
from l2o_graph.tracing.checks import parameters_of

if TYPE_CHECKING:  # imported later, only with a model
    from l2o_graph.tracing.network import Reading


class Structure:
    """Structure of the network that an optimizer trains, as far as it is known.

    With a model, its calls are watched until each of its parameters was used. Without one, the
    structure is inferred from order, shapes and names of the parameters.

    Args:
        owner: Name of the optimizer's type, for warnings.
        model: Network that is trained.
        examples: Counter of training examples.
        is_given: Whether the user passed the model. Only then are there warnings about it; a model
            that was found automatically is dropped silently if it is not what is trained.
    """

    def __init__(
        self,
        owner: str,
        model: nn.Module | None,
        examples: Examples | None = None,
        is_given: bool = True,
    ):
        self.owner, self.model, self.examples, self.is_given = owner, model, examples, is_given
        self.shards: Any = None  # process group that parameters are sharded over, if they are
        self.watching: Watching | None = None  # hooks on the model, while its calls are watched
        self._counting: Watching | None = None  # hooks that only count examples
        self._known: Reading | None = None
        self._news: list[Reading] = []
        self._warned: set[str] = set()  # names of parameters with a warning
        self._asked: set[int] = set()  # parameters for which watching was resumed
        self._group: Any = None  # process group that trains the model, once a call showed it
        self.forget()

    def forget(self) -> None:
        """Drop the structure; the next step determines it again."""
        self.spec: NetSpec | None = None  # result of the last call of network()
        self._agreed = False  # whether all ranks know the same
        self._renew()

    def replaced(self, trained: Collection[Tensor]) -> list[Tensor]:
        """List those of the optimizer's parameters that the model has replaced.

        The list is empty if a parameter of the model has a gradient and is not trained, which is a
        mistake of the user.
        """
        known = set() if self.model is None else {*parameters_of(self.model)}
        if not known or any(p.grad is not None and p not in trained for p in known):
            return []
        return [p for p in trained if p not in known]

    def copy(self) -> "Structure":
        """Copy what is known, without hooks, for a copy or a pickle of the optimizer.

        A model that was found automatically is not copied: users do not expect one in there.
        """
        model = self.model if self.is_given else None
        new = Structure(self.owner, model, self.examples, self.is_given)
        new._known, new._warned = self._known, set(self._warned)
        return new

    @property
    def traced(self) -> NetSpec | None:
        """Structure as read from calls of the model; None before the first."""
        return None if self._known is None else self._known.spec

    @property
    def is_complete(self) -> bool:
        """Whether calls have shown the use of all parameters of the model."""
        return self._known is not None and self._known.is_complete

    def _renew(self) -> None:
        """Watch the next calls of a model whose parameters have changed."""
        if self.model is None or self.traced is None:
            return
        parameters = parameters_of(self.model)
        if any(map(is_lazy, parameters)) or self.traced.shapes != shapes_of(parameters):
            self._known = None
            self._agreed = False
            self._asked.clear()
            self.watch()

    def watch(self) -> None:
        """Watch calls of the model until each of its parameters was used."""
        if self.model is not None and self.watching is None:
            self._put_hooks(structure=not self.is_complete)

    def drop(self) -> None:
        """Continue without the model, as it is not what is trained or is never called."""
        for watching in (self.watching, self._counting):
            if watching is not None:
                watching.give_up()
        self.model = self.watching = self._counting = None
        self.forget()

    def _put_hooks(self, structure: bool) -> None:
        """Replace the hooks on the model: for structure and examples, or for examples only."""
        assert self.model is not None
        for old in (self.watching, self._counting):
            if old is not None:
                old.leave()
        counts = self.examples is not None and not self.examples.is_over
        self.watching = Watching(self.model, self, self.examples) if structure else None
        alone = counts and not structure
        self._counting = Watching(self.model, None, self.examples) if alone else None

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> None:
        """Read the structure from a call with an example batch."""
        from l2o_graph.tracing.network import read

        if self.model is None:
            raise RuntimeError(
                f"{self.owner}: expected a model to read, found only parameters; pass model="
            )
        try:
            self._news.append(read(self.model, args, kwargs))
        except Exception as error:  # training can continue, and later calls may succeed
            self._warn_inferred(f"could not follow the model ({error!r})")
            return
        self._learn(self._news)

    def hear(self, reading: "Reading") -> None:
        """Receive what a call of the model showed."""
        self._news.append(reading)
        replicas = self._group or (self.watching and self.watching.group)
        if not replicas:  # otherwise all replicas learn it together
            self._learn(self._news)

    def _learn(self, readings: Sequence["Reading"]) -> None:
        """Merge what calls of the model showed, in this or in other processes."""
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
        """Before a step, merge what calls showed, and decide whether to keep watching.

        Replicas of DistributedDataParallel exchange what they saw, at their first step and whenever
        a parameter that none of them has seen in use has a gradient. Their gradients are the same,
        and so they exchange at the same steps.
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
            if not self._agreed and self._known is not None:  # seen only by this rank
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
        # They were used with other inputs or in another mode than the calls watched.
        again = set() if done else unseen - self._asked
        self._asked |= again
        # Hooks that were compiled with the model, and saw nothing, stay: changing them would cause
        # a recompilation.
        stay = watching is not None and watching.was_compiled and self._known is None
        if (done or tired or again) and (again or watching is not None) and not stay:
            self._put_hooks(structure=bool(again))
        if watching is not None and self.watching is not None:
            self.watching.was_compiled = watching.was_compiled
            self.watching.was_sharded = watching.was_sharded
        self._warn_of_unknown()

    def _unseen(self, gradient_of: Mapping[Tensor, Tensor]) -> set[int]:
        """Return the parameters of the model that have a gradient, but were not seen in use."""
        assert self.model is not None
        used = frozenset() if self._known is None else self._known.used
        return {
            i for i, p in enumerate(parameters_of(self.model)) if i not in used and p in gradient_of
        }

    def _warn_of_unknown(self) -> None:
        """Warn once of each parameter that is used in a way that is not understood."""
        names = [] if self._known is None else self._known.unknown
        new = [name for name in names if name not in self._warned]
        if new and self.is_given:
            from l2o_graph.tracing.network import unknown_message

            self._warned.update(new)
            warn(unknown_message(new))

    def network(
        self, trained: Sequence[Tensor], names: list[str] | None
    ) -> tuple[Sequence[Tensor], NetSpec]:
        """Return the parameters of the graph and its specification, inferred if no call showed it.

        ``trained`` are the optimizer's parameters, ``names`` their names, if all have one.
        """
        if self._group is None:
            self._learn(self._news)
        parameters = trained if self.model is None else parameters_of(self.model)
        # Parameters without a shape yet are refused by the functions that read them.
        if self.spec is None or self.spec.shapes != shapes_of(parameters):
            if self.model is None:
                self.spec = self.traced  # known if this is a copy of an optimizer with a model
                if self.spec is None or self.spec.shapes != shapes_of(parameters):
                    self.spec = spec_of_parameters(parameters, names)
            else:
                self._renew()
                self.spec = self.traced or self._spec_by_order(self.model)
        return parameters, self.spec

    def _spec_by_order(self, model: nn.Module) -> NetSpec:
        """Infer the structure of a model of which no call was seen."""
        spec = spec_of_module(model)
        if self.watching is not None and self.watching.was_compiled:
            self._warn_inferred(
                "the model was called inside compiled code, which cannot be followed (pass the "
                "compiled module itself as model=)"
            )
        elif self.watching is not None and self.watching.was_sharded:
            self._warn_inferred(
                "the model computes with sharded tensors (tensor parallelism), which cannot be "
                "followed"
            )
        elif spec.loose:
            self._warn_inferred(
                "the model was not called before this step",
                f", which gives {len(spec.loose)} of {len(spec.shapes)} parameters no place in the "
                "graph",
            )
        return spec

    def _warn_inferred(self, why: str, but: str = "") -> None:
        if not self.is_given:
            return
        said = "its structure is inferred from the order of its layers"
        warn(f"{self.owner}: {why}; {said}{but}")


def asked_of(params: object) -> nn.Module | None:
    """Find the module whose ``parameters()`` or ``named_parameters()`` were passed, if any.

    They may be filtered by ``filter`` or a generator expression. Until it ends, a generator holds
    its iterable and the arguments of its call.
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
    """Return shapes in the form of a network's specification."""
    return tuple(tuple(p.shape) for p in parameters)
