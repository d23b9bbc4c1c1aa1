"""Distributed checkpoint's folders, as its documentation has them written and read."""

from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from l2o_graph import LearnedOptimizer


def save_folder(model: nn.Module, optimizer: LearnedOptimizer, folder: Path) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)


def load_folder(model: nn.Module, optimizer: LearnedOptimizer, folder: Path) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    content = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(content, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=content["model"],
        optim_state_dict=content["optimizer"],
    )
