"""Several controllers, meta-trained apart and joined into one that answers their mean.

What evolution strategies come to differs from seed to seed, and each controller is at fault
somewhere else. The mean of their answers is better than most of them (docs/rule.md).
"""

import dataclasses
from pathlib import Path

import torch.distributed as dist

from l2o_graph.optim.checkpoints import load_checkpoint, save_controller
from l2o_graph.optim.controller import JOINED_READERS, joined
from l2o_graph.zoo.lock import held
from meta_train.controller_training import EvolutionConfig, provenance, train_controller
from meta_train.run import Result


def train_members(
    config: EvolutionConfig,
    out: Path,
    data_root: str | Path | None = None,
    resume: bool = False,
) -> Result:
    """Meta-train the members of a controller, one after the other, and join them.

    Args:
        config: The run; one member is a run of ``train_controller`` in ``out`` itself.
        out: Folder for a folder of each member and ``checkpoint.safetensors``.
        data_root: Where datasets lie.
        resume: Go on with what is in ``out``; members that are done are left as they are.

    Returns:
        The joined checkpoint, once all members are done; the state and log of the last one that
        was worked on.

    Raises:
        ValueError: For several members with a reader that cannot be joined; and as
            ``train_controller`` does, as for OSError.
    """
    if config.members == 1:
        return train_controller(config, out, data_root, resume)
    if config.controller.reader not in JOINED_READERS:
        raise ValueError(
            f"members: expected 1 with the reader '{config.controller.reader}', whose controllers "
            f"cannot be joined, found {config.members}"
        )
    rank = dist.get_rank() if dist.is_initialized() else 0
    with held(out / f"process-{rank}" if rank else out):
        return _all_members(config, out, rank, data_root, resume)


def _all_members(
    config: EvolutionConfig, out: Path, rank: int, data_root: str | Path | None, resume: bool
) -> Result:
    """``train_members`` in a folder that is this process's own; the first writes the checkpoint."""
    found: list[Result] = []
    for number in range(config.members):
        # No two members, and none of two runs, share a course.
        seed = config.seed * config.members + number
        own = dataclasses.replace(config, seed=seed, members=1)
        found.append(train_controller(own, out / f"member-{number}", data_root, resume))
        if not found[-1].finished:
            return dataclasses.replace(found[-1], checkpoint=None)
    steps = sum(result.steps for result in found)
    checkpoint = out / "checkpoint.safetensors"
    if not rank:
        loaded = [load_checkpoint(r.checkpoint) for r in found if r.checkpoint]
        curves = [member.provenance["curve"] for member in loaded]
        minutes = sum(member.provenance["minutes"] for member in loaded)
        save_controller(
            checkpoint,
            joined([member.controller for member in loaded]),
            provenance(config, steps, minutes) | {"curves": curves},
        )
    return dataclasses.replace(found[-1], checkpoint=checkpoint, steps=steps)
