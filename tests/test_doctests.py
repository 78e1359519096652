"""Every example in a docstring runs, under the canonical name of its module; everything public has a docstring."""

import ast
import doctest
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("mpq", "solvers", "sensitivity", "hardware_models")
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).glob("*.py"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
OPTIONAL = {
    re.split(r"[^\w.-]", requirement)[0].replace("-", "_").replace("scikit_learn", "sklearn")
    for requirements in PROJECT["optional-dependencies"].values()
    for requirement in requirements
}


def canonical_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "mpq" else ("mpq", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {canonical_name(file): file for file in FILES}


def missing_extra(error: BaseException | None) -> str | None:
    """The optional package whose absence caused an error, None for any other error."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in OPTIONAL:
            return error.name
        error = error.__cause__
    return None


class MissingExtraError(Exception):
    """An example needs an optional package that is not installed."""


class Runner(doctest.DocTestRunner):
    """Collects what failed; an example that needs a missing optional package stops its docstring."""

    def report_unexpected_exception(self, out: Any, test: Any, example: Any, exc_info: Any) -> None:
        if name := missing_extra(exc_info[1]):
            raise MissingExtraError(name)
        super().report_unexpected_exception(out, test, example, exc_info)


def run_examples(module: ModuleType, name: str) -> tuple[str, set[str]]:
    """What failed, and the optional packages that examples miss."""
    report: list[str] = []
    missing = set()
    runner = Runner(verbose=False)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        try:
            runner.run(test, out=report.append)
        except MissingExtraError as error:
            missing.add(str(error))
    return "".join(report), missing


def written_examples(file: Path) -> int:
    """How many examples the docstrings of a file hold, whether or not doctest's finder gets at them."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, documented)]
    return sum(len(doctest.DocTestParser().get_examples(ast.get_docstring(node) or "")) for node in nodes)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what an example writes
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if extra := missing_extra(error):
            pytest.skip(f"{name} needs {extra}")
        raise
    assert module.__name__ == name
    found = doctest.DocTestFinder().find(module, name)
    assert sum(len(test.examples) for test in found) == written_examples(MODULES[name]), "an example is out of reach"
    failed, missing = run_examples(module, name)
    assert not failed, failed
    if missing:
        pytest.skip(f"examples of {name} need {', '.join(sorted(missing))}")


def test_modules_are_listed_by_canonical_name() -> None:
    packages = {"mpq", "mpq.solvers", "mpq.sensitivity", "mpq.hardware_models"}
    assert packages | {"mpq.formats", "mpq.solvers.ilp"} <= set(MODULES)
    assert written_examples(MODULES["mpq.formats"]) > 0


def test_a_wrong_example_fails_and_a_missing_extra_is_named() -> None:
    module = ModuleType("example")
    module.__doc__ = ">>> 1 + 1\n3\n"
    failed, missing = run_examples(module, "example")
    assert "Expected:\n    3" in failed
    assert not missing
    assert {"transformers", "torchao", "sklearn"} <= OPTIONAL
    module.__doc__ = ">>> raise ImportError('pip install') from ModuleNotFoundError('', name='torchao.core')\n"
    assert run_examples(module, "example") == ("", {"torchao.core"})


def undocumented(tree: ast.Module) -> Iterator[str]:
    """The module, public functions, public classes and their public methods that have no docstring."""
    if ast.get_docstring(tree) is None:
        yield "1: the module"
    yield from _undocumented(tree, "")


def _undocumented(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        # Overloads and setters share the docstring of the function; an override has that of the overridden method.
        marks = {ast.unparse(decorator).rsplit(".", 1)[-1] for decorator in child.decorator_list}
        if ast.get_docstring(child) is None and not marks & {"overload", "setter", "override"}:
            yield f"{child.lineno}: {prefix}{child.name}"
        if isinstance(child, ast.ClassDef):
            yield from _undocumented(child, f"{prefix}{child.name}.")


@pytest.mark.parametrize("folder", FOLDERS)
def test_public_things_have_docstrings(folder: str) -> None:
    files = [file for file in FILES if file.parent.name == folder]
    assert files
    missing = [
        f"{folder}/{file.name}:{what}" for file in files for what in undocumented(ast.parse(file.read_text("utf-8")))
    ]
    assert not missing, "without a docstring:\n" + "\n".join(missing)


def test_missing_docstrings_are_noticed() -> None:
    code = '''
def f(): ...
def _g(): ...
class A:
    """Documented."""
    def h(self): ...
    def _i(self): ...
    @x.setter
    def x(self, value): ...
'''
    assert list(undocumented(ast.parse(code))) == ["1: the module", "2: f", "6: A.h"]
