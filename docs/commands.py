"""Writes commands.md, the page of all commands, from their parsers: ``python docs/commands.py``.

What an option does is its help; where that is "see SomeConfig", it is what the docstring of
SomeConfig says of the field. A test asks that the page is what this writes.
"""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from inspect import getdoc
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

PAGE = Path(__file__).with_name("commands.md")
CORES = 1_000_003  # a number that no option has, in the place of that of this machine

INTRO = """# Command line

Every command of the package, with all of its options. An option that is not given has the default
of the table; "recipe" is what the recipe of the model says ([inr.md](inr.md#train-them),
[generalization.md](generalization.md#train-them)). `--help` says the same in short.

Commands end with status 0 when they are done and 2 for a request that cannot be met, which a
sentence on standard error explains. Those that train can be stopped by Ctrl-C, and go on where they
stopped if they are given again (`meta_train` with `--resume`).

This page is written by `python docs/commands.py` from the commands themselves.
"""

# (module, what it is given, what it is for).
COMMANDS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "meta_train",
        ("--task", "general"),
        "Meta-train the controller of `NGOptimizer`, on families of small problems "
        "([how](rule.md#how-it-is-meta-trained)). Tasks: `general` has all families that are "
        "trained on, `fmnist_cnn` those of images alone. `--model` says what neurons know of each "
        "other. `torchrun --nproc-per-node N -m meta_train` shares the work among processes.",
    ),
    (
        "meta_train",
        ("--preset", "paper"),
        "Meta-train the learned optimizer of Kofinas et al. 2024, for `PaperOptimizer`. Tasks: "
        "`fmnist_cnn`, `cifar10_cnn`, `mnist_cnn`, `fmnist_mlp` and `fmnist_sample`; the images of "
        "the last are in the package.",
    ),
    (
        "meta_train",
        ("--task", "mnist_inr"),
        "Train a model that reads networks which hold images: to tell what they draw "
        "(`mnist_inr`, `fmnist_inr`, `cifar10_inr`, `sample_inr`) or to change it "
        "(`mnist_dilation`, `sample_dilation`). [More](inr.md#train-them).",
    ),
    (
        "meta_train",
        ("--task", "cnn_park"),
        "Train a model that predicts the accuracy of CNNs, of mixed architecture (`cnn_park`) or "
        "of one (`cnn_small`). [More](generalization.md#train-them).",
    ),
    (
        "meta_train.benchmark",
        (),
        "Compare `NGOptimizer` with tuned and untuned rivals ([figures](results.md)); "
        "`python -m meta_train.strangers` is the same. Tasks, listed below, are those that people "
        "have, `vit` to `value`, and those of `--preset paper` above, also with settings "
        "(`fmnist_cnn:width=64,batch=32`), for 1,000 steps at seeds from 101 on. `--tasks` also "
        "takes `all` or `quick`, of the first, and `--optimizers` also `all`, which is all but "
        "`adam` and `sgd`, or `rivals`; `--data-root sample` trains on stand-ins from the "
        "package. With `--steps 0` each task has its own number. "
        '`pip install -e ".[strangers]"` has what some need. Other devices than the CPU are for '
        "tasks of `--preset paper`.",
    ),
    (
        "meta_train.compare",
        (),
        "Compare controllers on families of problems that meta-training does not see.",
    ),
    (
        "meta_train.step_cost",
        (),
        "Measure what a step costs, in forward and backward passes ([figures](results.md#cost)); "
        "with `--memory` what `NGOptimizer` takes of memory as networks grow.",
    ),
    (
        "meta_train.tables",
        (),
        "Train all rows of a table of the paper, over seeds.",
    ),
    (
        "l2o_graph.datasets.inr",
        (),
        "Fit a network to each image of a dataset: a set of INRs ([more](inr.md#fit-them)).",
    ),
    (
        "l2o_graph.datasets.zoo",
        (),
        "Train many CNNs and keep checkpoints of each with its accuracy: a zoo "
        "([more](generalization.md#zoos)).",
    ),
)

# What options are, in place of a help that is missing or needs its neighbours to be understood.
WORDS = {
    "anytime": "stop every run at 1/8, 1/4 and 1/2 of its steps, too",
    "augment": "change networks at random in training",
    "batch": "number of images, or networks, of a step",
    "checkpoints": "number of checkpoints to keep of each run",
    "count": "number of images: of training, the others in proportion; or of training, validation "
    "and test",
    "draws": "number of draws of each family",
    "evaluate_every": "number of steps between evaluations; 0: at the end alone",
    "hold_out": "networks that have this trait are not trained on, and alone are tested: `depth=5`",
    "inrs": "folder of the networks",
    "jobs": "number of runs at the same time, of one thread each",
    "only": "rows with these words in their label",
    "resume": "go on with the run in `--out`",
    "rounds": "number of rounds for the largest network; small ones get more",
    "runs": "number of networks to train",
    "seeds": "number of seeds",
    "shard": "number of networks, or runs, in a file",
    "size": "side of the images in pixels; 0: half of theirs",
    "test_images": "number of images that accuracies are taken on; 0: all",
    "threads": "number of CPU threads; torch's own choice if not given",
    "train_images": "number of images to train on; 0: all",
    "views": "number of networks of a training image",
    "zoo": "folder of the networks",
    "checkpoint": "a learned optimizer: a name or a file",
    "dataset": "images that the networks are trained on",
    "data_root": "where datasets lie; by default `$L2O_GRAPH_DATA`, or `data`",
    "device": "where torch computes",
    "families": "kinds of problems to compare on",
    "grid": "learning rates to try in place of the optimizer's own",
    "kind": "networks of mixed architecture, or of one",
    "model": "what is trained",
    "loss": "squared error of the accuracy, or its cross-entropy",
    "optimizers": "what to compare",
    "out": "folder that results are written to",
    "recipe": "how networks are fitted",
    "seed": "seed of everything that is drawn",
    "source": "images that networks are fitted to",
    "steps": "number of training steps",
    "table": "which table",
    "task": "what to train on, see above",
    "tasks": "what to train",
}
SEE = re.compile(r"see (\w+)")


class _Parsed(Exception):
    """Carries a parser out of the command that made it."""


def parser_of(module: str, arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Find the parser that a command parses these arguments with."""

    def parse_args(self: argparse.ArgumentParser, *_: object) -> None:
        raise _Parsed(self)

    packages = ("meta_train", "l2o_graph.datasets.inr")
    name = f"{module}.__main__" if module in packages else module
    command = importlib.import_module(name)
    try:
        with (
            mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args),
            mock.patch("os.cpu_count", lambda: CORES),
        ):
            command.main(list(arguments))
    except _Parsed as found:
        return found.args[0]
    raise RuntimeError(f"expected a parser in {module}, found none")


def fields_of(module: SimpleNamespace, name: str) -> dict[str, str]:
    """What the docstrings of a configuration and its bases say of each field."""
    kind = getattr(module, name)
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        _, _, attributes = (getdoc(base) or "").partition("Attributes:\n")
        for entry in re.split(r"\n {4}(?=\w)", f"\n{attributes}"):
            field, _, text = entry.strip().partition(":")
            found[field] = " ".join(text.split())
    return found


def row(action: argparse.Action, configurations: SimpleNamespace) -> str:
    """Describe an option in a row of a table."""
    value = "" if action.metavar is None else f" {action.metavar}"
    names = " ".join(f"`{name}{value}`" for name in action.option_strings) or f"`{action.dest}`"
    text, _, own = (action.help or "").removesuffix(".").partition("[")
    if see := SEE.fullmatch(text.strip()):
        text = fields_of(configurations, see[1]).get(action.dest, "")
        if not text:
            raise RuntimeError(f"{see[1]}: expected a line on '{action.dest}', found none")
    if action.dest in WORDS and (not see or text.startswith("Of ")):
        text = WORDS[action.dest]
    text = text.strip().rstrip(".")
    text = text[0].upper() + text[1:]
    if action.choices and action.dest != "task":
        text = f"{text}: {', '.join(f'`{choice}`' for choice in action.choices)}"
    default = _default(action, own.rstrip("]") or action.default)
    return f"| {names} | {default} | {text.replace('|', '&#124;')} |"


def _default(action: argparse.Action, default: object) -> str:
    if action.required:
        return "required"
    if default == CORES:
        return "one for each core"
    if isinstance(default, list | tuple):
        return " ".join(f"`{each}`" for each in default)
    text = str(default)
    if "recipe's" in text:
        return "recipe"
    if default is None or type(default) is bool or "$" in text:
        return ""
    if text.startswith("default:"):
        return "`default`"
    return text if " " in text else f"`{text}`"


def page() -> str:
    """Write the page."""
    known: dict[str, object] = {}
    for module in (
        "l2o_graph.optim.controller",
        "l2o_graph.inr",
        "l2o_graph.cnn",
        "meta_train.config",
        "meta_train.evolution_config",
        "meta_train.supervised.inr",
        "meta_train.supervised.cnn",
    ):
        known |= vars(importlib.import_module(module))
    parts = [INTRO]
    for module, arguments, purpose in COMMANDS:
        parser = parser_of(module, arguments)
        title = " ".join(("python -m", module, *arguments))
        rows = [
            row(action, SimpleNamespace(**known))
            for action in parser._actions
            if action.dest != "help"
        ]
        table = "\n".join(("| option | default | what it is |", "|---|---|---|", *rows))
        parts.append(f"## {title}\n\n{purpose}\n\n{table}\n")
        if parser.epilog:
            text = parser.epilog.removesuffix(".")
            parts.append(f"{text[0].upper()}{text[1:]}.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(PAGE.parents[1]))
    PAGE.write_text(page(), encoding="utf-8")
