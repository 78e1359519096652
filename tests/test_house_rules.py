"""The rules of the source files: who imports whom, what `import mpq` leaves alone, ceilings, names, forbidden code."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path

import pytest

import mpq

ROOT = Path(__file__).parents[1]
PLUGINS = ("solvers", "sensitivity", "hardware_models")
FOLDERS = ("mpq", *PLUGINS)

# What is no noun in mpq/: the verbs and what the command line is made of. Plug-ins import none of it.
VERBS = (
    r"__init__|__main__|pipeline|planning|verification(_report)?|export(ing|_.*)|report(ing|_.*)|inspection|model_source|terminal"
    r"|conformance|\w+_conformance|(torchao_)?application|random_problems"
    r"|\w+_commands|command_\w+|completers|config_file|json_answers|table_contents|table_report"
    r"|evolution|studies|sampler_mirror|refinement"
    r"|evaluator|measured_search|shared_evaluator|layer_levels|kept_weights"
    r"|accuracy_constraint|pricing|checkpoint_search|importing|import_.*|comparison"
)
# Which modules of mpq/ may import torch at the top, as those of sensitivity/ may.
TORCH_MODULES = {
    *("activation_ranges", "adaquant", "adjustment", "batch_norm_tuning", "bias_correction", "gptq"),
    *("attention_formats", "evaluator", "layer_norm_scales", "plan_slopes", "shuffled_pieces"),
    *("estimator_conformance",),
    *("activations", "batches", "binary_coding", "cache", "calls", "dataflow", "demo", "demo_training"),
    *("fake_quantize", "gguf_blocks", "grids", "parameters", "quantizer", "rounding", "stored_weights", "surgery"),
    *("task_choice", "output_figures", "tasks", "tracing", "verification", "weight_view"),
}
HEAVY = {"torch", "pulp", "optuna", "pandas", "matplotlib", "plotly", "scipy", "rich", "pyarrow"}
PRINTING_FILES = {"mpq/__main__.py", "mpq/terminal.py", "mpq/demo_training.py"}
FORBIDDEN_NAMES = {"util", "utils", "helper", "helpers", "manager", "managers", "base"}
PICKLES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

MAX_FILE_LINES = 400
MAX_BODY_LINES = 40
MAX_PARAMETERS = 5
# Public signatures that the design fixes.
FIXED_SIGNATURES = {
    "mpq.pipeline.search",
    "mpq.sensitivity.estimation.estimate",
    "mpq.hardware_models.target.Target.costs",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One imported name, dotted and absolute. `at_top`: run by importing the file; `dynamic`: given as a string."""

    line: int
    name: str
    at_top: bool
    typing_only: bool
    dynamic: bool = False

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Source:
    """A file: its path in the repository and its text."""

    path: str
    text: str

    @property
    def folder(self) -> str:
        return self.path.split("/", 1)[0]

    @property
    def package(self) -> str:
        return "mpq" if self.folder == "mpq" else f"mpq.{self.folder}"

    @property
    def module(self) -> str:
        """The canonical name: mpq.solvers.ilp for solvers/ilp.py."""
        stem = self.path.rsplit("/", 1)[-1].removesuffix(".py")
        return self.package if stem == "__init__" else f"{self.package}.{stem}"

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def imports(self) -> list[Import]:
        """Every import, in functions and TYPE_CHECKING blocks as well, and `import_module` of a string."""
        return list(self._imports(self.tree, True, False))

    def _imports(self, node: ast.AST, at_top: bool, typing_only: bool) -> Iterator[Import]:
        children = list(ast.iter_child_nodes(node))
        match node:
            case ast.Import(names=names):
                yield from (Import(node.lineno, alias.name, at_top, typing_only) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parents = self.package.split(".")[: 1 - level or None] if level else []
                origin = ".".join([*parents, *([module] if module else [])])
                yield from (Import(node.lineno, f"{origin}.{alias.name}", at_top, typing_only) for alias in names)
            case ast.Call(args=[first, *_]) if re.search("import_module$|__import__$", called(node)):
                start = first.values[0] if isinstance(first, ast.JoinedStr) else first
                if isinstance(start, ast.Constant):
                    yield Import(node.lineno, str(start.value), at_top, typing_only, dynamic=True)
            case ast.If(test=test, body=body) if re.fullmatch(r"(typing\.)?_?TYPE_CHECKING", ast.unparse(test)):
                for statement in body:
                    yield from self._imports(statement, False, True)
                children = list(node.orelse)
        for child in children:
            yield from self._imports(child, at_top and not isinstance(node, Function), typing_only)

    @cached_property
    def functions(self) -> list[tuple[str, Function]]:
        """Functions and methods with their canonical names, nested ones included."""
        return list(_functions(self.tree, self.module))

    @cached_property
    def calls(self) -> list[ast.Call]:
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}.{child.name}" if isinstance(child, Function | ast.ClassDef) else prefix
        if isinstance(child, Function):
            yield name, child
        yield from _functions(child, name)


def called(node: ast.Call) -> str:
    """The dotted name that is called, "" for anything but a name."""
    return ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""


def read(*folders: str) -> list[Source]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return [Source(file.relative_to(ROOT).as_posix(), file.read_text("utf-8")) for file in files]


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    return read(*FOLDERS)


Violations = Iterator[tuple[int, str]]


def import_direction(source: Source) -> Violations:
    """Plug-ins import nouns of mpq and themselves; mpq imports no plug-in but by a string."""
    for found in source.imports:
        part = f"{found.name}.".split(".")[1]
        lazy = found.dynamic or (source.path == "mpq/__init__.py" and found.typing_only)
        if found.top in PLUGINS:
            yield found.line, f"{found.name} would be a second copy of mpq.{found.name}"
        elif found.top == "mpq" and source.folder == "mpq" and part in PLUGINS and not lazy:
            yield found.line, f"mpq imports the plug-in {found.name}"
        elif found.top == "mpq" and source.folder != "mpq" and part != source.folder and not is_noun(part):
            yield found.line, f"a plug-in imports {found.name}, which is no noun of mpq"


def is_noun(name: str) -> bool:
    return (ROOT / "mpq" / f"{name}.py").is_file() and not re.fullmatch(VERBS, name)


def star_import(source: Source) -> Violations:
    yield from ((found.line, found.name) for found in source.imports if found.name.endswith(".*"))


def torch_at_top(source: Source) -> Violations:
    lines = [found.line for found in source.imports if found.at_top and found.top == "torch"]
    if lines and source.folder != "sensitivity" and source.module.removeprefix("mpq.") not in TORCH_MODULES:
        yield lines[0], "torch imported at the top"


def file_ceiling(source: Source) -> Violations:
    lines = len(source.text.splitlines())
    if lines > MAX_FILE_LINES:
        yield lines, f"{lines} lines, at most {MAX_FILE_LINES}"


def body_ceiling(source: Source) -> Violations:
    for name, node in source.functions:
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
        if lines > MAX_BODY_LINES:
            yield node.lineno, f"{name} has {lines} lines, at most {MAX_BODY_LINES}"


def parameter_ceiling(source: Source) -> Violations:
    for name, node in source.functions:
        private = re.search(r"\._(?!_)", name)
        positional = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        count = len([argument for argument in positional if argument not in {"self", "cls"}])
        if count > MAX_PARAMETERS and not private and name not in FIXED_SIGNATURES:
            yield node.lineno, f"{name} takes {count} positional parameters, at most {MAX_PARAMETERS}"


def file_name(source: Source) -> Violations:
    stem = Path(source.path).stem
    if FORBIDDEN_NAMES & set(stem.split("_")):
        yield 1, f"{stem} says nothing: a file is named after its noun or method"


def forbidden_call(source: Source) -> Violations:
    names = {"eval", "exec"} if source.path in PRINTING_FILES else {"eval", "exec", "print"}
    found = [(node.lineno, called(node).removeprefix("builtins.")) for node in source.calls]
    yield from ((line, f"calls {name}") for line, name in found if name in names)


def assertion(source: Source) -> Violations:
    asserts = (node for node in ast.walk(source.tree) if isinstance(node, ast.Assert))
    yield from ((node.lineno, "assert: raise an error that says what to do") for node in asserts)


def unpickling(source: Source) -> Violations:
    for found in source.imports:
        if found.top in PICKLES or found.name == "torch.load":
            yield found.line, f"imports {found.name}"
    for node in source.calls:
        name = called(node)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if name.endswith(("read_pickle", "to_pickle")) or keywords.get("allow_pickle", "False") != "False":
            yield node.lineno, f"{name} reads or writes pickle"


Rule = Callable[[Source], Violations]
RULES: list[Rule] = [import_direction, star_import, torch_at_top, file_ceiling, body_ceiling, parameter_ceiling]
RULES += [file_name, forbidden_call, assertion, unpickling]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_sources_keep(rule: Rule, sources: list[Source]) -> None:
    assert {source.folder for source in sources} == set(FOLDERS)
    broken = [f"{source.path}:{line}: {text}" for source in sources for line, text in rule(source)]
    assert not broken, "\n" + "\n".join(broken)


ALLOWED = [
    (import_direction, "mpq/__init__.py", "if _TYPE_CHECKING:\n    from mpq.solvers import solve"),
    (import_direction, "mpq/pipeline.py", "import_module('mpq.solvers')\nfrom .formats import parse"),
    (import_direction, "solvers/x.py", "import numpy\nfrom mpq.problem import Proof\nfrom .ilp import ILPSolver"),
    (torch_at_top, "mpq/plan.py", "if TYPE_CHECKING:\n    import torch\ndef f():\n    import torch"),
    (torch_at_top, "mpq/tracing.py", "import torch"),
    (body_ceiling, "mpq/x.py", "def f():\n    '''" + "\n" * 99 + "'''\n    return 1"),
    (parameter_ceiling, "mpq/x.py", "def f(a, b, c, d, e, *, g): ...\ndef _f(a, b, c, d, e, g): ..."),
    (parameter_ceiling, "mpq/x.py", "class A:\n    def f(self, a, b, c, d, e): ..."),
    (parameter_ceiling, "hardware_models/target.py", "class Target:\n    def costs(self, a, b, c, d, e, f): ..."),
    (file_name, "mpq/database.py", ""),
    (forbidden_call, "mpq/terminal.py", "print(1)"),
    (unpickling, "mpq/x.py", "torch.load(path, weights_only=True)\nnp.load(path, allow_pickle=False)"),
    (forbidden_call, "mpq/x.py", "model.eval()"),
]
FORBIDDEN = [
    (import_direction, "mpq/x.py", "if TYPE_CHECKING:\n    from mpq.solvers import solve"),
    (import_direction, "mpq/x.py", "def f():\n    from . import solvers"),
    (import_direction, "mpq/__init__.py", "from mpq.solvers import solve"),
    (import_direction, "mpq/x.py", "import_module('solvers.ilp')"),
    (import_direction, "solvers/x.py", "import solvers"),
    (import_direction, "solvers/x.py", "import mpq"),
    (import_direction, "solvers/x.py", "from mpq import search"),
    (import_direction, "solvers/x.py", "from mpq.pipeline import search"),
    (import_direction, "solvers/x.py", "if TYPE_CHECKING:\n    from mpq.export_torchao import to_torchao"),
    (import_direction, "solvers/x.py", "from mpq.hardware_models import load"),
    (import_direction, "solvers/x.py", "from ..sensitivity import estimate"),
    (import_direction, "solvers/x.py", "import_module(f'mpq.sensitivity.{name}')"),
    (star_import, "mpq/x.py", "from numpy import *"),
    (torch_at_top, "mpq/plan.py", "try:\n    from torch.nn import Module, Linear\nexcept ImportError:\n    pass"),
    (torch_at_top, "mpq/plan.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch"),
    (file_ceiling, "mpq/x.py", "\n" * 401),
    (body_ceiling, "mpq/x.py", "class A:\n    def f(self):\n        return (" + "\n" * 40 + "1)"),
    (parameter_ceiling, "mpq/x.py", "def f(a, b, /, c, d, e, g): ..."),
    (parameter_ceiling, "mpq/x.py", "class A:\n    def __init__(self, a, b, c, d, e, g): ..."),
    (file_name, "solvers/ilp_utils.py", ""),
    (forbidden_call, "mpq/x.py", "print(1)"),
    (assertion, "mpq/x.py", "assert x"),
    (unpickling, "mpq/x.py", "def f():\n    from pickle import loads"),
    (unpickling, "mpq/x.py", "torch.load(path)"),
    (unpickling, "mpq/x.py", "from torch import load"),
    (unpickling, "mpq/x.py", "np.load(path, allow_pickle=True)"),
    (forbidden_call, "mpq/x.py", "eval('1')"),
]


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_rule_allows(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text))) == []


@pytest.mark.parametrize(("rule", "path", "text"), FORBIDDEN)
def test_rule_notices(rule: Rule, path: str, text: str) -> None:
    assert len(list(rule(Source(path, text)))) == 1


def test_fixed_signatures_exist(sources: list[Source]) -> None:
    assert {name for source in sources for name, _ in source.functions} >= FIXED_SIGNATURES


def test_tests_and_notebooks_use_canonical_names() -> None:
    written = read("tests", ".ci")
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in json.loads(file.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
        code = "\n".join("".join(cell["source"]) for cell in cells)
        written.append(Source(f"notebooks/{file.name}", re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", code)))
    copies = [f"{source.path}:{found.line}: {found.name}" for source in written for found in source.imports]
    copies = [copy for copy in copies if copy.split(": ")[1].split(".")[0] in PLUGINS]
    assert not copies, "second copies, import mpq.<name>:\n" + "\n".join(copies)


def run(code: str) -> str:
    """The output of a fresh interpreter, started at the file system's root, with the mpq of this session."""
    environment = {**os.environ, "PYTHONPATH": str(Path(mpq.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(*modules: str) -> set[str]:
    return set(run(f"import sys, {', '.join(modules)}; print(*{{name.split('.')[0] for name in sys.modules}})").split())


def test_importing_mpq_is_light() -> None:
    brought = imported_by("mpq", "mpq.solvers", "mpq.hardware_models", "mpq.sensitivity", "mpq.__main__")
    assert {"mpq", "numpy", "click"} <= brought
    assert not HEAVY & brought


def test_a_saved_table_needs_no_torch() -> None:
    nouns = ("formats", "options", "layers", "problem", "tables", "plan", "planning", "exporting", "terminal")
    brought = imported_by(*(f"mpq.{noun}" for noun in nouns), "mpq.solvers.ilp", "mpq.hardware_models.target")
    assert "numpy" in brought
    assert "torch" not in brought


@pytest.mark.parametrize("folder", FOLDERS)
def test_public_names_resolve_and_are_no_modules(folder: str) -> None:
    package = import_module("mpq" if folder == "mpq" else f"mpq.{folder}")
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is getattr(package, name)
    modules = {file.stem for file in (ROOT / folder).glob("*.py")} | set(PLUGINS)
    assert not modules & set(package.__all__)


def test_lazy_verbs_survive_their_modules() -> None:
    verbs = [name for name in mpq.__all__ if name.islower()]
    assert {"search", "verify", "export", "quantized", "trace"} <= set(verbs)
    run(f"import mpq.pipeline; assert all(callable(getattr(mpq, name)) for _ in (1, 2) for name in {verbs})")


# Brackets keep a pattern from matching its own line.
PRIVATE = {
    "a path of one machine": r"(?<![\w.])/(work|home|root|Users)[/]\w|[A-Z]:\\Users",
    "a package registry": r"pypi[.]org|pythonhosted[.]org|pytorch[.]org/whl|index[-]url|find[-]links|trusted[-]host",
    "a mirror": r"//[\w.-]*(artifactory|nexus|devpi|registry|mirror)[\w.-]*[.:]",
    "an address in a network": r"https?://(localhost|\d+[.]\d+[.]\d+[.]\d+)",
}


def private_lines(text: str) -> list[str]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        found += [f"{number}: {what}: {line[:100]}" for what, kind in PRIVATE.items() if re.search(kind, line)]
    return found


def test_no_machine_path_or_registry_host() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip(f"needs a git checkout: {listing.stderr.strip()}")
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text("utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # not text; deleted but not yet committed
            continue
        found += [f"{name}:{line}" for line in private_lines(text)]
    assert not found, "\n" + "\n".join(found)


PARTS = [
    ("see /", "work/x"),
    ("'/", "home/me'"),
    ("https://", "pypi.", "org"),
    ("--index", "-url x"),
    ("//devpi", ".x/"),
]


@pytest.mark.parametrize("parts", PARTS)
def test_private_lines_are_noticed(parts: tuple[str, ...]) -> None:
    assert len(private_lines("".join(parts))) == 1
    assert private_lines("a network/home/page, https://example.org, arXiv:2305.14314") == []
