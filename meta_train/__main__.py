"""``python -m meta_train --task fmnist_cnn``: parse, call, print."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import get_args

import torch

from l2o_graph.datasets.images import DATA_VARIABLE
from l2o_graph.rule import Model
from meta_train.config import MetaConfig, default_recipe, paper_recipe
from meta_train.tasks import TASKS
from meta_train.trainer import meta_train

RECIPES = {"default": default_recipe, "paper": paper_recipe}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 when the run finished, 130 when it was interrupted, 2 for bad input.
    """
    parser = argparse.ArgumentParser(
        prog="python -m meta_train",
        description="Meta-train a learned optimizer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--task", default="fmnist_cnn", choices=sorted(TASKS))
    parser.add_argument("--preset", default="default", choices=sorted(RECIPES))
    parser.add_argument("--model", default="ng_gnn", choices=get_args(Model))
    parser.add_argument("--out", type=Path, help="folder of the run [runs/TASK-MODEL-PRESET]")
    parser.add_argument("--data-root", help=f"where datasets lie [${DATA_VARIABLE} or data]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads [torch's own choice]")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    options = [f for f in dataclasses.fields(MetaConfig) if type(f.default) in (int, float)]
    for field in options:
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), help="see MetaConfig")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    config = RECIPES[given.preset](given.task, given.model)
    changes = {f.name: getattr(given, f.name) for f in options}
    out = given.out or Path("runs") / f"{given.task}-{given.model}-{given.preset}"
    try:
        config = dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})
        result = meta_train(config, out, given.data_root, given.device, given.resume)
    except (ValueError, OSError) as error:
        print(f"meta_train: {error}", file=sys.stderr)
        return 2
    print(f"{result.steps} of {config.outer_steps} outer steps, log in {result.log}")
    print(f"best learned optimizer: {result.checkpoint}")
    if not result.finished:
        print("interrupted; continue with the same command and --resume")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
