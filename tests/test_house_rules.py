"""The rules every source file keeps: who imports whom, what `import mpq` leaves alone, ceilings, names, forbidden calls."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import mpq

ROOT = Path(__file__).parents[1]
PLUGINS = ("solvers", "sensitivity", "hardware_models")
FOLDERS = ("mpq", *PLUGINS)

# What is not a noun in mpq/: verbs, and what the command line is made of. Plug-ins import none of it.
VERBS = r"__init__|__main__|pipeline|planning|verification|export(ing|_.*)|reporting|inspection|model_source|terminal"
# Files that may import torch at the top, beside those of sensitivity/.
TORCH_FILES = {
    f"mpq/{name}.py" for name in ("fake_quantize", "gguf_blocks", "tracing", "tasks", "surgery", "quantizer")
}
HEAVY = {"torch", "pulp", "optuna", "pandas", "matplotlib", "plotly", "scipy", "rich", "pyarrow"}
PRINTING_FILES = {"mpq/__main__.py", "mpq/terminal.py"}
FORBIDDEN_NAMES = {"util", "utils", "helper", "helpers", "manager", "managers", "base"}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

MAX_FILE_LINES = 400
MAX_BODY_LINES = 40
MAX_PARAMETERS = 5
# Public signatures that the design fixes.
FIXED_SIGNATURES = {
    "mpq.pipeline.search",
    "mpq.sensitivity.estimation.estimate",
    "mpq.hardware_models.target.Target.costs",
}

Violation = tuple[int, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A file: its path in the repository and its text."""

    path: str
    text: str

    @property
    def folder(self) -> str:
        return self.path.split("/")[0]

    @property
    def module(self) -> str:
        """The canonical name: solvers/ilp.py is mpq.solvers.ilp."""
        parts = self.path.removesuffix(".py").removesuffix("/__init__").split("/")
        return ".".join(parts if parts[0] == "mpq" else ["mpq", *parts])

    @property
    def package(self) -> str:
        return "mpq" if self.folder == "mpq" else f"mpq.{self.folder}"

    @property
    def tree(self) -> ast.Module:
        return _parse(self.text, self.path)


@cache
def _parse(text: str, path: str) -> ast.Module:
    return ast.parse(text, path)


def read(*folders: str) -> list[Source]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return [Source(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files]


# --- imports ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """One imported name, dotted and absolute. `at_top`: run by importing the file. `dynamic`: by a string."""

    line: int
    name: str
    at_top: bool = False
    typing_only: bool = False
    dynamic: bool = False


class ImportFinder(ast.NodeVisitor):
    """Every import of a file, in functions and TYPE_CHECKING blocks as well, and `import_module` of a string."""

    def __init__(self, source: Source) -> None:
        self.package = source.package
        self.in_function = self.in_typing = False
        self.found: list[Import] = []
        self.visit(source.tree)

    def add(self, line: int, name: str, dynamic: bool = False) -> None:
        at_top = not self.in_function and not self.in_typing
        self.found.append(Import(line, name, at_top, self.in_typing, dynamic))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(node.lineno, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parents = self.package.split(".")[: 1 - node.level or None] if node.level else []
        origin = [*parents, *([node.module] if node.module else [])]
        for alias in node.names:
            self.add(node.lineno, ".".join([*origin, alias.name]))

    def visit_Call(self, node: ast.Call) -> None:
        if called(node).split(".")[-1] in {"import_module", "_import_module", "__import__"} and node.args:
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(name, ast.Constant):
                self.add(node.lineno, str(name.value), dynamic=True)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        before, self.in_typing = self.in_typing, self.in_typing or ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in node.body:
            self.visit(child)
        self.in_typing = before
        for child in node.orelse:
            self.visit(child)

    def visit_FunctionDef(self, node: Function) -> None:
        before, self.in_function = self.in_function, True
        self.generic_visit(node)
        self.in_function = before

    visit_AsyncFunctionDef = visit_FunctionDef


def called(node: ast.Call) -> str:
    """The dotted name that is called, "" for anything but a name."""
    return ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""


def import_direction(source: Source) -> Iterator[Violation]:
    """Plug-ins import nouns of mpq and themselves; mpq imports no plug-in but by a string."""
    for found in ImportFinder(source).found:
        top, _, rest = found.name.partition(".")
        part = rest.split(".")[0]
        if top in PLUGINS:
            yield found.line, f"{found.name} would be a second copy: it is mpq.{found.name}"
        elif top != "mpq":
            continue
        elif source.folder == "mpq":
            allowed = found.dynamic or (source.path == "mpq/__init__.py" and found.typing_only)
            if part in PLUGINS and not allowed:
                yield found.line, f"mpq imports the plug-in {found.name}"
        elif part != source.folder and not is_noun(part):
            yield found.line, f"a plug-in imports {found.name}, which is no noun of mpq"


def is_noun(name: str) -> bool:
    return (ROOT / "mpq" / f"{name}.py").is_file() and not re.fullmatch(VERBS, name)


def star_import(source: Source) -> Iterator[Violation]:
    for found in ImportFinder(source).found:
        if found.name.endswith(".*"):
            yield found.line, f"star import of {found.name}"


def torch_at_top(source: Source) -> Iterator[Violation]:
    if source.path in TORCH_FILES or source.folder == "sensitivity":
        return
    for found in ImportFinder(source).found:
        if found.at_top and found.name.split(".")[0] in {"torch", "mpq.torch"}:
            yield found.line, f"{found.name} imported at the top"


# --- ceilings and names -----------------------------------------------------------------------------------------------


def file_ceiling(source: Source) -> Iterator[Violation]:
    lines = len(source.text.splitlines())
    if lines > MAX_FILE_LINES:
        yield lines, f"{lines} lines, at most {MAX_FILE_LINES}"


def functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    """Functions and methods with their dotted names, nested ones included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            name = f"{prefix}.{child.name}"
            if isinstance(child, Function):
                yield name, child
            yield from functions(child, name)
        else:
            yield from functions(child, prefix)


def body_ceiling(source: Source) -> Iterator[Violation]:
    for name, node in functions(source.tree, source.module):
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
        if lines > MAX_BODY_LINES:
            yield node.lineno, f"{name} has {lines} lines, at most {MAX_BODY_LINES}"


def parameter_ceiling(source: Source) -> Iterator[Violation]:
    for name, node in functions(source.tree, source.module):
        private = any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
        positional = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        count = len([argument for argument in positional if argument not in {"self", "cls"}])
        if count > MAX_PARAMETERS and not private and name not in FIXED_SIGNATURES:
            yield node.lineno, f"{name} takes {count} positional parameters, at most {MAX_PARAMETERS}"


def file_name(source: Source) -> Iterator[Violation]:
    stem = source.path.rsplit("/", 1)[-1].removesuffix(".py")
    if FORBIDDEN_NAMES & set(stem.split("_")):
        yield 1, f"{stem} says nothing: a file is named after its noun or method"


# --- forbidden code ---------------------------------------------------------------------------------------------------


def calls(source: Source) -> Iterator[tuple[ast.Call, str, dict[str, str]]]:
    """Calls with the dotted name that is called and the keywords as source."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            yield node, called(node), {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}


def printing(source: Source) -> Iterator[Violation]:
    if source.path not in PRINTING_FILES:
        for node, name, _ in calls(source):
            if name == "print":
                yield node.lineno, "print outside the command line"


def assertion(source: Source) -> Iterator[Violation]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Assert):
            yield node.lineno, "assert statement: raise an error that says what to do"


def unpickling(source: Source) -> Iterator[Violation]:
    for found in ImportFinder(source).found:
        if found.name.split(".")[0] in PICKLES:
            yield found.line, f"imports {found.name}"
    for node, name, keywords in calls(source):
        last = name.split(".")[-1]
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if last in {"read_pickle", "to_pickle"} or keywords.get("allow_pickle", "False") != "False":
            yield node.lineno, f"{last} reads or writes pickle"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and "load" in {name.name for name in node.names}:
            yield node.lineno, "from torch import load hides weights_only from this test"


def evaluation(source: Source) -> Iterator[Violation]:
    for node, name, _ in calls(source):
        if name in {"eval", "exec", "builtins.eval", "builtins.exec"}:
            yield node.lineno, f"calls {name}"


Rule = Callable[[Source], Iterator[Violation]]
RULES: list[Rule] = [
    import_direction,
    star_import,
    torch_at_top,
    file_ceiling,
    body_ceiling,
    parameter_ceiling,
    file_name,
    printing,
    assertion,
    unpickling,
    evaluation,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_sources_keep(rule: Rule) -> None:
    sources = read(*FOLDERS)
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
    (printing, "mpq/terminal.py", "print(1)"),
    (unpickling, "mpq/x.py", "torch.load(path, weights_only=True)\nnp.load(path, allow_pickle=False)"),
    (evaluation, "mpq/x.py", "model.eval()"),
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
    (torch_at_top, "mpq/plan.py", "try:\n    from torch.nn import Module\nexcept ImportError:\n    pass"),
    (file_ceiling, "mpq/x.py", "\n" * 401),
    (body_ceiling, "mpq/x.py", "class A:\n    def f(self):\n        return (" + "\n" * 40 + ")"),
    (parameter_ceiling, "mpq/x.py", "def f(a, b, /, c, d, e, g): ..."),
    (parameter_ceiling, "mpq/x.py", "class A:\n    def __init__(self, a, b, c, d, e, g): ..."),
    (file_name, "solvers/ilp_utils.py", ""),
    (printing, "mpq/x.py", "print(1)"),
    (assertion, "mpq/x.py", "assert x"),
    (unpickling, "mpq/x.py", "def f():\n    from pickle import loads"),
    (unpickling, "mpq/x.py", "torch.load(path)"),
    (unpickling, "mpq/x.py", "torch.load(path, weights_only=False)"),
    (unpickling, "mpq/x.py", "np.load(path, allow_pickle=True)"),
    (evaluation, "mpq/x.py", "eval('1')"),
]


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_rule_allows(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text))) == []


@pytest.mark.parametrize(("rule", "path", "text"), FORBIDDEN)
def test_rule_notices(rule: Rule, path: str, text: str) -> None:
    assert len(list(rule(Source(path, text)))) == 1


def test_fixed_signatures_exist() -> None:
    assert {name for source in read(*FOLDERS) for name, _ in functions(source.tree, source.module)} >= FIXED_SIGNATURES


def test_tests_and_notebooks_use_canonical_names() -> None:
    sources = read("tests", ".ci")
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in json.loads(file.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
        code = "\n".join("".join(cell["source"]) for cell in cells)
        sources.append(Source(f"notebooks/{file.name}", re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", code)))
    copies = [
        f"{source.path}:{found.line}: {found.name}"
        for source in sources
        for found in ImportFinder(source).found
        if found.name.split(".")[0] in PLUGINS
    ]
    assert not copies, "second copies, import mpq.<name>:\n" + "\n".join(copies)


# --- what an import brings along --------------------------------------------------------------------------------------


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
    nouns = (
        "formats",
        "options",
        "layers",
        "problem",
        "budgets",
        "tables",
        "plan",
        "planning",
        "exporting",
        "terminal",
    )
    brought = imported_by(*(f"mpq.{noun}" for noun in nouns), "mpq.solvers.ilp", "mpq.hardware_models.target")
    assert "numpy" in brought
    assert "torch" not in brought


# --- public names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["mpq", *(f"mpq.{name}" for name in PLUGINS)])
def test_public_names_resolve_and_are_no_modules(package: str) -> None:
    module = import_module(package)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is getattr(module, name)
    folder = ROOT / package.split(".")[-1]
    modules = {file.stem for file in folder.glob("*.py")} | (set(FOLDERS) if package == "mpq" else set())
    assert not modules & set(module.__all__)


def test_lazy_verbs_survive_their_modules() -> None:
    verbs = [name for name in mpq.__all__ if name.islower()]
    assert {"search", "verify", "export", "quantized", "trace"} <= set(verbs)
    code = f"""
import mpq
first = {{name: getattr(mpq, name) for name in {verbs}}}
import mpq.pipeline, mpq.verification, mpq.exporting, mpq.surgery, mpq.tracing
for name, verb in first.items():
    assert callable(verb) and getattr(mpq, name) is verb and getattr(mpq, name) is verb, name
"""
    run(code)
    run("import mpq.pipeline; assert callable(mpq.search); assert mpq.search is mpq.search is mpq.pipeline.search")


# --- what must not be in the repository -------------------------------------------------------------------------------

# Brackets keep a pattern from matching its own line here.
PRIVATE = {
    "a path of one machine": r"(?<![\w.])/(work|home|root|Users)[/]\w|[A-Z]:\\Users",
    "a package registry": r"pypi[.]org|pythonhosted[.]org|pytorch[.]org/whl|(extra-)?index[-]url|find[-]links|trusted[-]host"
    r"|//[\w.-]*(artifactory|nexus|devpi|registry|mirror)[\w.-]*[.:]",
    "an address of a network": r"https?://(localhost|\d+[.]\d+[.]\d+[.]\d+)",
}


def private_lines(text: str) -> list[str]:
    return [
        f"{number}: {what}: {line.strip()[:100]}"
        for number, line in enumerate(text.splitlines(), 1)
        for what, pattern in PRIVATE.items()
        if re.search(pattern, line)
    ]


def test_no_machine_path_or_registry_host() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
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


@pytest.mark.parametrize(
    "parts",
    [("see /", "work/main"), ("'/", "home/me'"), ("https://", "pypi.", "org/simple"), ("pip --index", "-url x")],
)
def test_private_lines_are_noticed(parts: tuple[str, ...]) -> None:
    assert len(private_lines("".join(parts))) == 1
    assert private_lines("a network/home/page, https://example.org, arXiv:2305.14314") == []
