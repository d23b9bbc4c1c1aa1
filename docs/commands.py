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

All commands end with status 0 when they are done and 2 for a request that cannot be met, in one
sentence on standard error; after Ctrl-C they end with 130, and go on where they stopped if they
are given again (`meta_train` with `--resume`).

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
        "Meta-train the learned optimizer of Kofinas et al. 2024, for `PaperOptimizer`. Tasks are "
        "those of `meta_train.tasks`.",
    ),
    (
        "meta_train",
        ("--task", "mnist_inr"),
        "Train a model that reads networks which hold images: to tell what they draw "
        "(`mnist_inr`, `fmnist_inr`, `sample_inr`) or to change it (`mnist_dilation`, "
        "`sample_dilation`). [More](inr.md#train-them).",
    ),
    (
        "meta_train",
        ("--task", "cnn_park"),
        "Train a model that predicts the accuracy of CNNs, of mixed architecture (`cnn_park`) or "
        "of one (`cnn_small`). [More](generalization.md#train-them).",
    ),
    (
        "meta_train.strangers",
        (),
        "Compare `NGOptimizer` with tuned and untuned rivals on tasks that people have "
        '([figures](results.md#tasks-of-strangers)). `pip install -e ".[strangers]"` has what '
        "some of them need.",
    ),
    (
        "meta_train.compare",
        (),
        "Compare controllers on families of problems that meta-training does not see.",
    ),
    (
        "meta_train.benchmark",
        (),
        "Compare optimizers on one or several tasks, over several seeds, each at the best rate of "
        "its grid: a table and curves.",
    ),
    (
        "meta_train.transfer",
        (),
        "Find where an optimizer stops working: other widths, depths, batches, lengths and "
        "networks.",
    ),
    (
        "meta_train.step_cost",
        (),
        "Measure what a step costs, in forward and backward passes ([figures](results.md#cost)).",
    ),
    ("meta_train.scaling", (), "Measure time and memory of a step as networks grow."),
    (
        "meta_train.tables",
        (),
        "Train all rows of a table of the paper, over seeds. What follows `--` is given to each "
        "`python -m meta_train`.",
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

# Options that have no help of their own, in all commands.
WORDS = {
    "checkpoint": "a learned optimizer of your own, from a file",
    "dataset": "images that the networks are trained on",
    "data_root": "where datasets lie; by default `$L2O_GRAPH_DATA`, or `data`",
    "device": "where torch computes",
    "families": "kinds of problems to compare on",
    "grid": "learning rates to try in place of the optimizer's own",
    "help": "",
    "kind": "of mixed architecture (park), or one architecture (small)",
    "model": "what is trained",
    "loss": "mse: squared error of the accuracy; bce: its cross-entropy",
    "nets": "networks to measure on",
    "networks": "networks to measure on",
    "optimizers": "what to compare",
    "out": "folder that results are written to",
    "rate": "learning rate in place of the optimizer's own",
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

    name = f"{module}.__main__" if module in ("meta_train", "meta_train.strangers") else module
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
    names = " ".join(f"`{name}`" for name in action.option_strings) or f"`{action.dest}`"
    text = (action.help or "").removesuffix(".")
    text, _, own = text.partition("[")
    default: object = own.rstrip("]") if own else action.default
    if see := SEE.search(text):
        fields = fields_of(configurations, see[1])
        found = fields.get(action.dest, "").rstrip(".")
        if not found:
            raise RuntimeError(f"{see[1]}: expected a line on '{action.dest}', found none")
        text = found if text.startswith("see") else f"{text[: see.start()].rstrip(', ')}: {found}"
    if not text.strip():
        text = WORDS[action.dest]
    if action.choices:
        text = f"{text.strip()}: {', '.join(f'`{choice}`' for choice in action.choices)}"
    return f"| {names} | {_default(action, default)} | {text.strip().replace('|', '&#124;')} |"


def _default(action: argparse.Action, default: object) -> str:
    if action.required:
        return "required"
    if default == CORES:
        return "one for each core"
    if default is None or default is False or default == []:
        return ""
    if isinstance(default, list | tuple):
        return " ".join(f"`{each}`" for each in default)
    text = str(default).replace("the recipe's own", "recipe").replace("or the model's own", "")
    text = text.replace("the recipe's", "recipe").strip()
    return text if " " in text or text == "recipe" else f"`{text}`"


def page() -> str:
    """Write the page."""
    known: dict[str, object] = {}
    for module in (
        "l2o_graph.optim.controller",
        "l2o_graph.inr",
        "l2o_graph.cnn",
        "meta_train.config",
        "meta_train.controller_training",
        "meta_train.inr_training",
        "meta_train.cnn_training",
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
    return "\n".join(parts)


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(PAGE.parents[1]))
    PAGE.write_text(page(), encoding="utf-8")
