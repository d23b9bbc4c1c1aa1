"""The command line of meta-training: ``python -m meta_train --task fmnist_cnn``."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist

from l2o_graph.cnn import CNNModelConfig
from l2o_graph.datasets.images import DATA_VARIABLE
from l2o_graph.datasets.workers import check_device
from l2o_graph.inr import AMOUNTS, INRModelConfig
from l2o_graph.metanets.cnn_config import Model as CNNModel
from l2o_graph.metanets.inr_config import Model as INRModel
from l2o_graph.optim.controller import ControllerConfig, Grain, Reader
from l2o_graph.paper.rule import Model
from l2o_graph.ranges import THREADS
from meta_train.config import Estimator, MetaConfig, paper_recipe
from meta_train.controller_training import train_controller
from meta_train.evolution_config import CONTROLLER_TASKS, EvolutionConfig
from meta_train.run import Result
from meta_train.supervised import cnn as cnn_training
from meta_train.supervised import inr as inr_training
from meta_train.supervised.cnn import CNN_TASKS, CNNTrainingConfig, Loss, train_cnn_model
from meta_train.supervised.inr import INR_TASKS, INRTrainingConfig, train_inr_model
from meta_train.tasks import TASKS
from meta_train.trainer import meta_train

INR_RECIPES = {"default": inr_training.default_recipe, "paper": inr_training.paper_recipe}
CNN_RECIPES = {"default": cnn_training.default_recipe, "paper": cnn_training.paper_recipe}

# Reader and grain of the controller for each value of --model.
CONTROLLERS: dict[str, tuple[Reader, Grain]] = {
    "ff": ("none", "tensor"),
    "alone": ("none", "neuron"),
    "lstm": ("sequence", "neuron"),
    "nfn": ("mean", "neuron"),
    "ng_gnn": ("messages", "neuron"),
    "ng_t": ("attention", "neuron"),
}

# Fields of configurations that are options: for all weight-space models, for INRs and for CNNs.
OF_READERS = ("hidden", "dropout", "fourier", "reverse", "probes")
OF_INR_MODELS = ("answers", "generated", "canonical", "positions")
OF_CNN_MODELS = ("logits", "responses", "scaled", "activations")
# Options whose defaults depend on the model.
OF_RECIPE = {(CNNTrainingConfig, "lr"), (CNNTrainingConfig, "batch")}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the options depend on the task.

    Returns:
        Exit status: 0 if the run finished, 130 if it was interrupted, 2 for bad input.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--task", default="fmnist_cnn")
    first.add_argument("--preset", default="default")
    given = first.parse_known_args(arguments)[0]
    commands = dict.fromkeys(INR_TASKS, train_on_inrs) | dict.fromkeys(CNN_TASKS, train_on_cnns)
    optimizer = train_paper_rule if given.preset == "paper" else train_optimizer
    command = commands.get(given.task, optimizer)
    try:
        with processes(allowed=command is train_optimizer):
            result = command(arguments)
            print(f"{result.steps} steps, log in {result.log}")
            print(f"best checkpoint: {result.checkpoint}")
            if not result.finished:
                print("interrupted; continue with the same command and --resume")
    except (ValueError, OSError) as error:
        print(f"meta_train: {error}", file=sys.stderr)
        return 2
    return 0 if result.finished else 130


@contextmanager
def processes(allowed: bool) -> Iterator[None]:
    """Join the processes started by torchrun, if any; only the first one prints."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and not allowed:
        raise ValueError(
            f"WORLD_SIZE: expected one process for anything but {sorted(CONTROLLER_TASKS)} with "
            f"the default preset, found {count}"
        )
    if count <= 1:
        yield
        return
    dist.init_process_group("gloo")
    try:
        with ExitStack() as silence:
            if dist.get_rank():
                nowhere = silence.enter_context(Path(os.devnull).open("w"))
                silence.enter_context(redirect_stdout(nowhere))
                silence.enter_context(redirect_stderr(nowhere))
            yield
    finally:
        dist.destroy_process_group()


def train_optimizer(arguments: list[str] | None) -> Result:
    """Meta-train the controller of NGOptimizer."""
    text = "Meta-train the controller of NGOptimizer."
    parser = _parser(text, list(CONTROLLERS), default="alone", device=False)
    sizes = _options(parser, ControllerConfig)
    parser.add_argument("--initial", help="checkpoint with initial weights [none]")
    options = [*_options(parser, EvolutionConfig), "initial"]
    given = _parsed(parser, arguments)
    reader, grain = CONTROLLERS[given.model]
    controller = ControllerConfig(reader, grain, **_changes(given, sizes))
    config = EvolutionConfig(given.task, controller, **_changes(given, options))
    out = given.out or Path("runs") / f"{given.task}-{given.model}-{given.preset}"
    return train_controller(config, out, given.data_root, given.resume)


def train_paper_rule(arguments: list[str] | None) -> Result:
    """Meta-train the learned optimizer of Kofinas et al. 2024."""
    text = "Meta-train the learned optimizer of Kofinas et al. 2024."
    parser = _parser(text, get_args(Model))
    options = _options(parser, MetaConfig)
    parser.add_argument("--estimator", choices=get_args(Estimator), help="see MetaConfig [greedy]")
    given = _parsed(parser, arguments)
    config = paper_recipe(given.task, given.model)
    config = dataclasses.replace(config, **_changes(given, [*options, "estimator"]))
    out = given.out or Path("runs") / f"{given.task}-{given.model}-{given.preset}"
    return meta_train(config, out, given.data_root, given.device, given.resume)


def train_on_inrs(arguments: list[str] | None) -> Result:
    """Train a model that reads implicit neural representations."""
    text = "Train a model that reads implicit neural representations."
    parser = _parser(text, get_args(INRModel))
    parser.add_argument("--inrs", help="folder of the INRs [runs/inr-DATASET]")
    sizes = _options(parser, INRModelConfig, *OF_READERS, *OF_INR_MODELS)
    text = "data augmentation of networks [the recipe's own]"
    parser.add_argument("--augment", choices=("none", *AMOUNTS), help=text)
    options = [*_options(parser, INRTrainingConfig), "augment"]
    given = _parsed(parser, arguments)
    config = INR_RECIPES[given.preset](given.task, given.model, **_changes(given, sizes))
    config = dataclasses.replace(config, **_changes(given, options))
    out = given.out or Path("runs") / f"{given.task}-{given.model}-{config.model.probes}"
    inrs = given.inrs or f"runs/inr-{INR_TASKS[given.task][0]}"
    return train_inr_model(config, inrs, out, given.data_root, given.device, given.resume)


def train_on_cnns(arguments: list[str] | None) -> Result:
    """Train a model that predicts the accuracy of CNNs."""
    parser = _parser("Train a model that predicts the accuracy of CNNs.", get_args(CNNModel))
    parser.add_argument("--zoo", help="folder of the networks [runs/zoo-KIND]")
    parser.add_argument("--loss", choices=get_args(Loss), help="loss [the recipe's own]")
    sizes = _options(parser, CNNModelConfig, *OF_READERS, *OF_CNN_MODELS)
    parser.add_argument(
        "--hold-out", metavar="TRAIT=VALUE", help="trait of networks only for testing, as depth=5"
    )
    options = [*_options(parser, CNNTrainingConfig), "loss", "hold_out"]
    options += _options(parser, CNNTrainingConfig, "augment")
    given = _parsed(parser, arguments)
    config = CNN_RECIPES[given.preset](given.task, given.model, **_changes(given, sizes))
    config = dataclasses.replace(config, **_changes(given, options))
    out = given.out or Path("runs") / f"{given.task}-{given.model}-{config.loss}"
    zoo = given.zoo or f"runs/zoo-{CNN_TASKS[given.task]}"
    return train_cnn_model(config, zoo, out, given.device, given.resume)


def _parser(
    description: str, models: Sequence[str], default: str = "ng_gnn", device: bool = True
) -> argparse.ArgumentParser:
    """Create a parser with the options of all tasks, and a device for most."""
    parser = argparse.ArgumentParser(
        prog="python -m meta_train",
        description=f"{description} Which options there are depends on --task and --preset.",
    )
    tasks = sorted({*TASKS, *CONTROLLER_TASKS, *INR_TASKS, *CNN_TASKS})
    parser.add_argument("--task", default="fmnist_cnn", choices=tasks, help="task [fmnist_cnn]")
    parser.add_argument(
        "--model", default=default, choices=models, help=f"model to train [{default}]"
    )
    text = "recipe for all options that are not given [default: the numbers in brackets]"
    parser.add_argument("--preset", default="default", choices=("default", "paper"), help=text)
    parser.add_argument("--out", type=Path, help="folder of the run [runs/TASK-MODEL-...]")
    parser.add_argument("--data-root", help=f"folder of datasets [${DATA_VARIABLE} or data]")
    if device:
        parser.add_argument("--device", default="cpu", help="device of torch [cpu]")
    parser.add_argument("--threads", type=int, help="CPU threads [torch's own choice]")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    return parser


def _options(parser: argparse.ArgumentParser, config: type, *names: str) -> list[str]:
    """Add an option for each field of these names, or for each number; return their names."""
    chosen = []
    for field in dataclasses.fields(config):
        kind: Any = type(field.default)
        own = field.default
        if field.name not in names if names else kind not in (int, float):
            continue
        if names or (config, field.name) in OF_RECIPE:
            own = "the recipe's own"
        flag, text = "--" + field.name.replace("_", "-"), f"see {config.__name__} [{own}]"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, type=kind, help=text)
        chosen.append(field.name)
    return chosen


def _parsed(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    given = parser.parse_args(arguments)
    if given.threads is not None:
        THREADS.check("threads", given.threads)
        torch.set_num_threads(given.threads)
    if "device" in given:
        check_device(given.device)
    return given


def _changes(given: argparse.Namespace, options: Sequence[str]) -> dict[str, Any]:
    """Collect the options that were given."""
    return {name: getattr(given, name) for name in options if getattr(given, name) is not None}


if __name__ == "__main__":
    sys.exit(main())
