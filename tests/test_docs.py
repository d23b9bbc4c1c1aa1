"""The site: examples run, links lead somewhere, all public names and commands are on a page."""

import contextlib
import doctest
import importlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))

# What other people import: what is in __all__ of these is public.
PUBLIC = (
    "l2o_graph",
    "l2o_graph.inr",
    "l2o_graph.cnn",
    "l2o_graph.tracing",
    "meta_train.families",
    "meta_train.tasks",
)
# Pages whose blocks of Python are one program, run from the top. "```text" behind a block is what
# it prints, "..." being anything; "```console" is the same with any numbers.
RUN = ("concepts", "expressivity", "extending", "first-steps", "how-it-works", "install")
BLOCK = re.compile(
    r"^```python\n(.*?)^```\n(?:\n```(text|console)\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL
)
NUMBER = re.compile(r"\d[\d.]*(e[+-]\d+)?")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def loaded(path):
    """A Python file of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def _registries():
    """What a page registers is gone behind it."""
    from l2o_graph.metanets import cnn_config as cnn
    from l2o_graph.metanets import inr_config as inr
    from l2o_graph.paper import readers
    from l2o_graph.tracing import network
    from meta_train import controller_training, families, tasks

    known = (
        readers.REGISTERED, cnn.REGISTERED, inr.REGISTERED, network.LAYERS, families.FAMILIES,
        tasks.TASKS, controller_training.CONTROLLER_TASKS,
    )  # fmt: skip
    before = [dict(each) for each in known]
    yield
    for each, content in zip(known, before, strict=True):
        each.clear()
        each.update(content)
    tasks.get_task.cache_clear()


def ran(source, namespace, name):
    """What a block prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(source, name, "exec"), namespace)
    return out.getvalue()


@pytest.mark.usefixtures("_registries")
@pytest.mark.parametrize("name", RUN)
def test_a_page_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks
    namespace = {"__name__": name}
    for block in blocks:
        line = text.count("\n", 0, block.start()) + 1
        source, kind, expected = block.groups()
        found = ran("\n" * line + source, namespace, f"{name}.md")
        if kind == "console":
            expected, found = NUMBER.sub("#", expected), NUMBER.sub("#", found)
        if kind is not None:
            same = doctest.OutputChecker().check_output(expected, found, FLAGS)
            assert same, f"{name}.md, line {line}: expected\n{expected}\nfound\n{found}"


def with_examples():
    """Modules with examples in their source."""
    found = {}
    for path in (*(ROOT / "l2o_graph").rglob("*.py"), *(ROOT / "meta_train").rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


@pytest.mark.parametrize("name", with_examples())
def test_examples_of_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert result.attempted and not result.failed


def test_every_public_name_is_on_one_page_of_the_reference():
    expected = [f"{m}.{name}" for m in PUBLIC for name in importlib.import_module(m).__all__]
    again = {  # documented where it is at home
        "l2o_graph.GeneralizationPredictor", "l2o_graph.predict_accuracy",
        "l2o_graph.INRClassifier", "l2o_graph.INREditor", "l2o_graph.tracing.register_layer",
    }  # fmt: skip
    found = [
        name
        for page in sorted((DOCS / "api").glob("*.md"))
        for name in DIRECTIVE.findall(page.read_text(encoding="utf-8"))
    ]
    assert again < {*expected}
    assert not {*expected} - {*found} - again, "public, and on no page of docs/api"
    assert len(found) == len({*found})
    for name in found:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_every_public_name_says_what_it_is():
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            thing = getattr(importlib.import_module(module), name)
            if callable(thing):
                assert thing.__doc__, f"{module}.{name}"


def test_every_function_that_the_page_of_the_rule_names_is_there():
    text = (DOCS / "how-it-works.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)\.(\w+)`", BLOCK.sub("", text))
    functions = {(module, name) for module, name in named if name != "py"}
    assert len(functions) > 15
    for module, name in functions:
        assert callable(getattr(importlib.import_module(f"l2o_graph.optim.{module}"), name)), name


def test_the_page_of_commands_is_what_the_commands_say():
    commands = loaded(DOCS / "commands.py")
    written = commands.PAGE.read_text(encoding="utf-8")
    assert commands.page() == written, "run: python docs/commands.py"


def slug(heading):
    """The anchor of a heading, as on GitHub and on the site."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", text.lower()).strip())


@pytest.mark.parametrize(
    "page", [*(ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *PAGES],
    ids=lambda page: page.name,
)  # fmt: skip
def test_links_within_the_repository_lead_somewhere(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            content = FENCED.sub("", target.read_text(encoding="utf-8"))
            anchors = {slug(h) for h in re.findall(r"^#+ (.*)$", content, re.MULTILINE)}
            assert anchor in anchors, f"{page.name}: {link}"


def test_the_citation_is_of_this_version():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"\nversion: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()


def rows_of(page: str, width: int) -> dict[str, list[str]]:
    """Rows of so many cells in the tables of a page, by their first cell."""
    lines = (ROOT / page).read_text().splitlines()
    cells = [[c.strip(" *") for c in x.strip("| ").split("|")] for x in lines if x[:2] == "| "]
    return {row[0]: row[1:] for row in cells if len(row) == width}


def test_the_first_table_repeats_the_merits_of_the_results():
    results, readme = rows_of("docs/results.md", 12), rows_of("README.md", 8)
    columns = [results["task"].index(c) for c in ("AdamW", "AdamW, default", "Muon", "SOAP")]
    columns += [results["task"].index(c) for c in ("NG", "NG, averaged", "NG, total_steps")]
    shown = {label: found for label, found in readme.items() if label}
    assert len(shown) > 12
    for label, found in shown.items():
        task = next(name for name in results if label.startswith(name))
        assert label.endswith(results[task][0].removeprefix("accuracy, ")), "its merit"
        expected = [results[task][c].partition(" ")[0].strip("*") for c in columns]
        assert found == expected, "the same figures, without the rates of rivals"
