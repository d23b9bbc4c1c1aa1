"""Writes commands.md, the page of all commands, from their parsers: ``python docs/commands.py``.

The description of an option is its help text, or, if that is "see SomeConfig", the line about the
field in the docstring of SomeConfig. A test checks that the page is up to date.
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
CORES = 1_000_003  # stands for the number of CPUs; no option has this value

INTRO = """# Command line

All commands of the package with their options. The second column has the defaults; "recipe" means
that the default depends on the model ([inr.md](inr.md#train-them),
[generalization.md](generalization.md#train-them)). `--help` lists the same options.

Exit status is 0 for success, and 2 for a request that cannot be met, with an explanation on
standard error. Training can be stopped by Ctrl-C, and continues if you run the same command again
(`meta_train` with `--resume`).

This page is written by `python docs/commands.py` from the commands themselves.
"""

# (module, arguments, purpose).
COMMANDS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "meta_train",
        ("--task", "general"),
        "Meta-train the controller of `NGOptimizer`, on families of small problems "
        "([how](rule.md#how-it-is-meta-trained)). Tasks: `general` has all families of "
        "meta-training, `fmnist_cnn` only those of images. `--model` selects how neurons exchange "
        "information. `torchrun --nproc-per-node N -m meta_train` uses N processes.",
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
        "Train a model that reads INRs: to classify their images (`mnist_inr`, `fmnist_inr`, "
        "`cifar10_inr`, `sample_inr`) or to edit them (`mnist_dilation`, `sample_dilation`). "
        "[More](inr.md#train-them).",
    ),
    (
        "meta_train",
        ("--task", "cnn_park"),
        "Train a model that predicts the accuracy of CNNs, of mixed architectures (`cnn_park`) or "
        "of one (`cnn_small`). [More](generalization.md#train-them).",
    ),
    (
        "meta_train.benchmark",
        (),
        "Compare `NGOptimizer` with tuned and untuned rivals ([figures](results.md)); "
        "`python -m meta_train.strangers` is the same. Tasks are those of strangers, `vit` to "
        "`value` below, and those of `--preset paper` above, also with settings "
        "(`fmnist_cnn:width=64,batch=32`), for 1,000 steps at seeds from 101 on. `--tasks` also "
        "takes `all` or `quick`, for all or some tasks of strangers. `--optimizers` also takes "
        "`all`, which is all but `adam` and `sgd`, or `rivals`. `--data-root sample` trains on "
        "stand-ins from the package. With `--steps 0` each task has its own number of steps. Some "
        'tasks need `pip install -e ".[strangers]"`. Only tasks of `--preset paper` run on other '
        "devices than the CPU.",
    ),
    (
        "meta_train.compare",
        (),
        "Compare controllers on families that are not part of meta-training.",
    ),
    (
        "meta_train.step_cost",
        (),
        "Measure the cost of a step in forward and backward passes ([figures](results.md#cost)); "
        "with `--memory`, the memory of `NGOptimizer` for networks of growing size.",
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
        "Train many CNNs and store checkpoints with their accuracies: a zoo "
        "([more](generalization.md#zoos)).",
    ),
)

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
