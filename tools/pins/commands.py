"""What commands write: sets of networks, runs of training, help texts."""

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from .find import Made, command_of, named

COMMANDS = (
    "l2o_graph.datasets.inr", "l2o_graph.datasets.zoo", "meta_train.benchmark",
    "meta_train.compare", "meta_train.step_cost", "meta_train.strangers", "meta_train.tables",
)  # fmt: skip
# Each of these tasks has options of its own.
TASKS = ("general", "mnist_inr", "mnist_dilation", "cnn_park", "cnn_small")


def data_pins() -> Made:
    """Bytes of the files of tiny sets of networks, and what is read of them."""
    yield "inrs", _inr_set
    yield "cnns", lambda: [_cnn_set("park"), _cnn_set("small")]


INR_SET = (
    "--source", "fmnist_sample", "--steps", "3", "--jobs", "1", "--shard", "2", "--batch", "2",
    "--views", "2",
)  # fmt: skip
CNN_SET = (
    "--dataset", "fmnist_sample", "--runs", "6", "--steps", "3", "--jobs", "1", "--checkpoints",
    "2", "--batch", "4", "--test-images", "20", "--shard", "2",
)  # fmt: skip


def _inr_set() -> list[Any]:
    found, folder = _made("l2o_graph.datasets.inr", [*INR_SET, "--count", "3"])
    with folder:
        inrs = named("load_inrs")(folder.name, "train")
        pixels = named("render")(inrs.weights, inrs.biases, (28, 28))
        generator = torch.Generator().manual_seed(3)
        changed = named("augmented", "dropped")([*inrs.weights], [*inrs.biases], generator)
        statistics = repr(named("statistics_of")(inrs.weights, inrs.biases))
    return [found, inrs.labels, inrs.index, inrs.view, inrs.psnr, pixels, [*changed], statistics]


def _cnn_set(kind: str) -> list[Any]:
    found, folder = _made("l2o_graph.datasets.zoo", [*CNN_SET, "--kind", kind])
    with folder:
        networks = named("load_cnns")(folder.name, "train")
    return [found, repr(networks.architectures), networks.values, networks.accuracy]


def _made(module: str, command: list[str]) -> tuple[dict[str, bytes], Any]:
    folder = tempfile.TemporaryDirectory()
    run = command_of(module)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = run([*command, "--out", folder.name])
    files = sorted(Path(folder.name).iterdir())
    content = {f.name: f.read_bytes() for f in files if f.suffix in (".safetensors", ".json")}
    if code or not content:
        raise RuntimeError(f"{module} ended with {code}, and wrote {sorted(content)}")
    return content, folder


def training_pins() -> Made:
    """Short runs of training by the command line: what they log and keep."""
    small = ["--epochs", "3", "--batch", "2", "--evaluate-every", "2", "--hidden", "8"]
    for model in ("ng_gnn", "mlp"):
        yield f"inr-{model}", lambda m=model: _trained_reader("sample_inr", m, small)
    yield "inr-edit", lambda: _trained_reader("sample_dilation", "ng_t", small)
    yield (
        "inr-paper",
        lambda: _trained_reader(
            "sample_inr", "ng_t", [*small, "--preset", "paper", "--probes", "3"]
        ),
    )
    yield "cnn-ng_gnn", lambda: _trained_reader("cnn_park", "ng_gnn", [*small, "--augment"])
    yield "cnn-ng_t", lambda: _trained_reader("cnn_park", "ng_t", [*small, "--piece", "1"])
    steps = ["--preset", "paper", "--outer-steps", "2", "--unroll", "2", "--evaluate-steps", "2"]
    yield "paper", lambda: _run(["--task", "fmnist_sample", "--model", "ff", *steps])


def _trained_reader(task: str, model: str, options: list[str]) -> list[Any]:
    if task == "cnn_park":
        _, folder = _made("l2o_graph.datasets.zoo", [*CNN_SET, "--kind", "park"])
        where = ["--zoo", folder.name]
    else:
        _, folder = _made("l2o_graph.datasets.inr", [*INR_SET, "--count", "4"])
        where = ["--inrs", folder.name]
    with folder:
        found = _run(["--task", task, "--model", model, *where, *options])
    return [str(x).replace(folder.name, "") if isinstance(x, str) else x for x in found]


def _run(command: list[str]) -> list[Any]:
    """What a run wrote, without times, the commit and its folders."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        with contextlib.redirect_stderr(io.StringIO()):
            code = command_of("meta_train")([*command, "--out", out])
        if code:
            raise RuntimeError(f"meta_train ended with {code}")
        lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
        logged = [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]
        paths = sorted(Path(out).glob("*.safetensors"))
        tensors = [[path.name, *sorted(load_file(path).items())] for path in paths]
        config = json.loads((Path(out) / "config.json").read_text())
        return [repr(logged), tensors, sorted(config), sorted(p.name for p in Path(out).iterdir())]


def help_pins() -> Made:
    """Help texts of all commands."""
    for command in COMMANDS:
        yield command, lambda c=command: _help(c, [])
    for task in TASKS:
        for preset in ("default", "paper"):
            given = ["--task", task, "--preset", preset]
            yield f"meta_train-{task}-{preset}", lambda g=given: _help("meta_train", g)


def _help(module: str, given: list[str]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        command_of(module)([*given, "--help"])
    if "usage" not in said.getvalue():
        raise RuntimeError(f"{module} has no help")
    return said.getvalue()
