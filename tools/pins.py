"""Compare what two work trees compute, bit for bit.

    python -m tools.pins OTHER_TREE          # this tree and another, in this environment
    python -m tools.pins --save pins.json    # what this tree computes, to compare later
    python -m tools.pins OTHER_TREE --only optimizer readers

For changes that are to change nothing, as moves and merges of equal arithmetic. What is pinned is a
hash of every result: steps of optimizers, gradients of meta-training, answers of packaged readers,
weights of untrained models, names of state, structures, files and help texts. Things are looked up
by name, wherever a tree has them, so that they may move. One thread, about two minutes a tree.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parents[1]
PACKAGES = ("l2o_graph", "meta_train")
STEPS = 5
COMMANDS = (
    "l2o_graph.datasets.inr", "l2o_graph.datasets.zoo", "meta_train.benchmark",
    "meta_train.compare", "meta_train.scaling", "meta_train.step_cost",
    "meta_train.strangers", "meta_train.tables", "meta_train.transfer",
)  # fmt: skip
# Each of these tasks has options of its own.
TASKS = ("general", "mnist_inr", "mnist_dilation", "cnn_park", "cnn_small")
FAMILIES = ("regression", "cnn", "attention", "embedding", "recurrence")

Pins = dict[str, str]


def main(arguments: list[str] | None = None) -> int:
    """Compare, or save; 1 where something differs."""
    parser = argparse.ArgumentParser(prog="python -m tools.pins", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("other", nargs="?", type=Path, help="work tree, or a file of --save")
    parser.add_argument("--save", type=Path, help="write this tree's pins to a file")
    parser.add_argument("--only", nargs="+", choices=sorted(GROUPS), default=sorted(GROUPS))
    given = parser.parse_args(arguments)
    found = pins_of(HERE, given.only)
    if given.save is not None:
        given.save.write_text(json.dumps(found, indent=1))
    if given.other is None:
        print(json.dumps(found, indent=1))
        return 0
    if given.other.is_file():
        other = json.loads(given.other.read_text())
        other = {k: v for k, v in other.items() if k.partition("/")[0] in given.only}
    else:
        other = pins_of(given.other.resolve(), given.only)
    different = [k for k in sorted(found | other) if found.get(k) != other.get(k)]
    failed = [k for k in sorted(found) if found[k].startswith("failed")]
    for key in different:
        print(f"{key}: here {found.get(key)}, there {other.get(key)}")
    for key in failed:
        print(f"{key}: {found[key]}")
    print(f"{len(found)} pins, {len(different)} differ, {len(failed)} could not be made here")
    return 1 if different or failed else 0


def pins_of(tree: Path, groups: list[str]) -> Pins:
    """Pins of a work tree, made in a process of its own that imports that tree."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pins.json"
        environment = os.environ | {
            "PYTHONPATH": str(tree), "COLUMNS": "100", "OMP_NUM_THREADS": "1", "L2O_GRAPH_DATA": "",
        }  # fmt: skip
        program = [sys.executable, "-W", "ignore", __file__, "--inside", str(out), *groups]
        subprocess.run(program, check=True, cwd=folder, env=environment)
        return json.loads(out.read_text())


def inside(out: Path, groups: list[str]) -> None:
    """Make pins of what is imported here."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    found: Pins = {}
    for group in groups:
        for name, make in GROUPS[group]():
            torch.manual_seed(0)
            try:
                value = bits(make())
            except Exception as error:  # named and compared like any other result
                value = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            found[f"{group}/{name}"] = value
    out.write_text(json.dumps(found))


def bits(value: Any) -> str:
    """A short hash of tensors, numbers, texts and bytes, in lists or dictionaries."""
    digest = hashlib.sha256()

    def add(x: Any) -> None:
        if isinstance(x, Tensor):
            digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
            digest.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(x, dict):
            for key, each in x.items():
                digest.update(str(key).encode())
                add(each)
        elif isinstance(x, list | tuple):
            for each in x:
                add(each)
        else:
            digest.update(x if isinstance(x, bytes) else repr(x).encode())

    add(value)
    return digest.hexdigest()[:16]


@cache
def _defined() -> dict[str, list[str]]:
    """Modules that define a name at their top, for every such name."""
    where: dict[str, list[str]] = {}
    for package in PACKAGES:
        root = Path(importlib.import_module(package).__file__ or "").parent
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            module = ".".join(parts).removesuffix(".__init__")
            for node in ast.parse(path.read_text()).body:
                names = [getattr(node, "name", None)]
                if isinstance(node, ast.Assign | ast.AnnAssign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    names = [t.id for t in targets if isinstance(t, ast.Name)]
                for name in names:
                    if name is not None:
                        where.setdefault(name, []).append(module)
    return where


def named(name: str, beside: str = "") -> Any:
    """What a tree calls so, wherever it is; of several, the one beside another name."""
    modules = _defined().get(name, [])
    if beside:
        modules = [m for m in modules if m in _defined()[beside]]
    if len(modules) != 1:
        raise LookupError(f"expected one '{name}' beside '{beside}', found {modules}")
    return getattr(importlib.import_module(modules[0]), name)


def command_of(module: str) -> Callable[[list[str]], int]:
    """The function behind ``python -m MODULE``."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    return found.main


class _Attention(nn.Module):
    """A transformer layer between an embedding and the same embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the tokens at each position."""
        return self.layer(self.embed(x)) @ self.embed.weight.T


class _Recurrent(nn.Module):
    """A GRU and a linear layer."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """What is said behind the last step."""
        return self.out(self.rnn(x)[0][:, -1])


def mlp() -> tuple[nn.Module, Tensor]:
    """Linear layers and a norm, and a batch."""
    layers = nn.Linear(6, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 7), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(7, 3)), torch.randn(8, 6)


def cnn() -> tuple[nn.Module, Tensor]:
    """Convolutions, a norm, a flattening, and a batch."""
    first = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)
    second = nn.Conv2d(4, 6, 3), nn.SiLU(), nn.Flatten(), nn.Linear(24, 3)
    return nn.Sequential(*first, *second), torch.randn(4, 2, 8, 8)


def attention() -> tuple[nn.Module, Tensor]:
    """The transformer layer and tokens."""
    return _Attention(), torch.randint(11, (3, 5))


def recurrent() -> tuple[nn.Module, Tensor]:
    """The GRU and sequences."""
    return _Recurrent(), torch.randn(4, 5, 4)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": mlp, "cnn": cnn, "attention": attention, "recurrent": recurrent,
}  # fmt: skip


def trained(
    network: str, dtype: torch.dtype, make: Callable[[nn.Module], torch.optim.Optimizer]
) -> list[Any]:
    """Parameters and state after some steps."""
    model, batch = NETWORKS[network]()
    model = model.to(dtype)
    batch = batch.to(dtype) if batch.is_floating_point() else batch
    optimizer = make(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    state = optimizer.state_dict()
    return [list(model.state_dict().values()), repr(state["param_groups"]), _flat(state["state"])]


def _flat(x: Any) -> Any:
    """State with numbers and texts as text, tensors as they are."""
    if isinstance(x, dict):
        return {k: _flat(v) for k, v in x.items()}
    return x if isinstance(x, Tensor | list | tuple) else repr(x)


Made = Iterator[tuple[str, Callable[[], Any]]]


def optimizer_pins() -> Made:
    """Steps of NGOptimizer with every packaged checkpoint, with the model and without."""
    from l2o_graph import NGOptimizer, list_checkpoints

    for checkpoint in list_checkpoints():
        for network in NETWORKS:
            for dtype in (torch.float32, torch.float64):
                for with_model in (True, False):

                    def make(model: nn.Module, c=checkpoint, w=with_model) -> Any:
                        parameters = model.named_parameters()
                        return NGOptimizer(parameters, checkpoint=c, model=model if w else None)

                    name = f"{checkpoint}-{network}-{dtype}-{with_model}"
                    yield name, lambda n=network, d=dtype, m=make: trained(n, d, m)
    yield "explain", _explained


def _explained() -> str:
    from l2o_graph import NGOptimizer

    model, batch = cnn()
    optimizer = NGOptimizer(model.parameters(), model=model, total_steps=9)
    model(batch).sum().backward()
    optimizer.step()
    return str(optimizer.explain())


def paper_pins() -> Made:
    """The paper's rule: steps, and both of its meta-gradients."""
    from l2o_graph import PaperOptimizer

    untrained, config, presets = named("untrained"), named("RuleConfig"), named("PAPER")
    for kind, preset in presets.items():
        for dtype in (torch.float32, torch.float64):
            for network in ("mlp", "cnn"):
                for size in (1 << 17, 7):

                    def make(model: nn.Module, p=preset, d=dtype, s=size) -> Any:
                        # The table of positions has 10,000 rows, which take most of the time.
                        rule = untrained(replace(p, layers=2), 0).to(d)
                        parameters = model.named_parameters()
                        return PaperOptimizer(parameters, checkpoint=rule, chunk_size=s)

                    name = f"{kind}-{network}-{dtype}-{size}"
                    yield name, lambda n=network, d=dtype, m=make: trained(n, d, m)
        for estimator in ("greedy", "through_time"):
            small = config(kind, hidden=8, layers=2, inner=8)
            yield f"{kind}-{estimator}", lambda s=small, e=estimator: _meta_gradient(s, e)


def _meta_gradient(config: Any, estimator: str) -> list[Any]:
    rule = named("untrained")(config, 0)
    for i, p in enumerate(rule.parameters()):  # heads are zero at first
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    task = named("get_task")("fmnist_sample:width=4,batch=8")
    task.load(None)
    problem = task.problem(1, torch.device("cpu"))
    losses = named(estimator)(rule, problem, 2)
    return [losses, [torch.empty(0) if p.grad is None else p.grad for p in rule.parameters()]]


def evolution_pins() -> Made:
    """A span of training of each family, its scores and the estimate of a gradient."""
    for family in FAMILIES:
        yield family, lambda f=family: _evolved(f)


def _evolved(family: str) -> list[Any]:
    controller = named("Controller")(named("ControllerConfig")(hidden=4, channels=2))
    config = controller.config
    weights = torch.cat([p.detach().flatten() for p in controller.parameters()])
    weights += 0.1 * torch.randn(weights.shape)
    noise = named("perturbations")(3, 2, len(weights))
    vectors = named("perturbed", "perturbations")(weights, noise, 0.1)
    course = named("start", "Course")(family, 7, 2, 6, True)
    losses = course.span(config, named("weights_from")(config, vectors), 4)
    estimate, difference = named("gradient", "perturbations")(
        named("score", "Course")(losses), noise
    )
    return [losses, estimate, difference, course.parameters, course.averages]


def sirens(count: int, layout: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """First weights of SIRENs, with biases."""
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    weights, biases = named("initialise")(generators, layout)
    return weights, [b + 0.01 * torch.randn(b.shape) for b in biases]


def cnns(count: int) -> Any:
    """CNNs of two architectures, drawn."""
    of = named("CNNArchitecture")
    architectures = (
        of((3, 4, 6), (3, 5), ("relu", "tanh"), (-1, -1), (1, 2)),
        of((3, 5, 7, 7), (3, 3, 1), ("gelu", "relu", "silu"), (-1, 0, 1), (1, 1, 1)),
    )
    which = torch.arange(count) % 2
    values = tuple(0.3 * torch.randn(architectures[i].num_parameters) for i in which.tolist())
    numbers = torch.arange(count)
    return named("CNNs")(architectures, which, values, torch.rand(count), numbers, numbers)


def reader_pins() -> Made:
    """Logits and gradients of the packaged readers of networks."""
    from l2o_graph.cnn import list_cnn_models
    from l2o_graph.inr import list_inr_models

    for name in list_inr_models():
        yield f"inr-{name}", lambda n=name: _inr_answers(named("load_inr_model")(n))
    for name in list_cnn_models():
        predictor = named("GeneralizationPredictor")
        yield f"cnn-{name}", lambda n=name, p=predictor: _cnn_answers(p.from_checkpoint(n))
    yield "predict_accuracy", _predicted


def _inr_answers(model: nn.Module) -> list[Any]:
    model.requires_grad_(True)
    answer = model(*sirens(3, tuple(model.config.layout)))
    parts = [answer] if isinstance(answer, Tensor) else [*answer[0], *answer[1]]
    sum(part.square().sum() for part in parts).backward()
    return [parts, _gradients(model), list(model.state_dict())]


def _cnn_answers(model: nn.Module) -> list[Any]:
    model.requires_grad_(True)
    logits = model.logits(cnns(5))
    logits.square().sum().backward()
    return [logits, _gradients(model), list(model.state_dict())]


def _gradients(model: nn.Module) -> list[Tensor]:
    return [torch.empty(0) if p.grad is None else p.grad for p in model.parameters()]


def _predicted() -> float:
    from l2o_graph import predict_accuracy

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )  # fmt: skip
    return float(predict_accuracy(model, torch.zeros(1, 3, 8, 8)))


def model_pins() -> Made:
    """Weights, answers and gradients of untrained models, for each configuration."""
    for model, task in named("SIZES", "INRModelConfig"):
        for changes in _inr_changes(model):
            name = f"inr-{model}-{task}-{changes}"
            yield name, lambda m=model, t=task, c=changes: _inr_model(m, t, c)
    for model, zoo in named("SIZES", "CNNModelConfig"):
        yield f"cnn-{model}-{zoo}", lambda m=model, z=zoo: _cnn_model(m, z)
    for kind, preset in named("PAPER").items():
        yield f"rule-{kind}", lambda p=preset: named("untrained")(p, 0).state_dict()
    for reader in ("none", "sequence", "mean", "messages", "attention"):
        for grain in ("tensor", "neuron"):
            yield f"controller-{reader}-{grain}", lambda r=reader, g=grain: _controller(r, g)


def _inr_changes(model: str) -> list[dict[str, Any]]:
    if model not in ("ng_gnn", "ng_t"):
        return [{}]
    return [{}, {"probes": 4, "reverse": True}, {"positions": False, "normalise": False}]


def _inr_model(model: str, task: str, changes: dict[str, Any]) -> list[Any]:
    config = named("inr_config")(model, task, layout=(2, 8, 8, 1), hidden=8, **changes)
    statistics = None
    if config.normalise:
        statistics = named("Statistics").neutral(len(config.layout) - 1)
    of = named("INRClassifier") if task == "classify" else named("INREditor")
    made = of(config, statistics)
    return [made.state_dict(), repr(config), _inr_answers(made)]


def _cnn_model(model: str, zoo: str) -> list[Any]:
    config = named("cnn_config")(model, zoo)
    config = replace(config, hidden=16) if model != "stat_nn" else config
    made = named("GeneralizationPredictor")(config)
    answers = _cnn_answers(made) if zoo == "park" else []
    return [made.state_dict(), json.dumps(config.to_json()), answers]


def _controller(reader: str, grain: str) -> dict[str, Tensor]:
    return named("Controller")(named("ControllerConfig")(reader, grain)).state_dict()


def structure_pins() -> Made:
    """What is understood of networks, and their exchange with torch-geometric."""
    for network in NETWORKS:
        yield f"{network}", lambda n=network: _structure(n)


def _structure(network: str) -> list[Any]:
    from l2o_graph import neural_graph

    model, batch = NETWORKS[network]()
    followed = neural_graph(model, batch)
    guessed = neural_graph(model.named_parameters())
    data = followed.to_data()
    tensors = [data.x, data.edge_index, data.edge_attr, data.activation, data.loose]
    again = type(followed).from_data(data)
    told = [repr(g.spec) + str(g.spec) for g in (followed, guessed, again)]
    return [told, followed.values, tensors, again.values]


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


GROUPS: dict[str, Callable[[], Made]] = {
    "data": data_pins,
    "evolution": evolution_pins,
    "help": help_pins,
    "models": model_pins,
    "optimizer": optimizer_pins,
    "paper": paper_pins,
    "readers": reader_pins,
    "structure": structure_pins,
    "training": training_pins,
}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(main())
