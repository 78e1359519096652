"""The pages in docs/: code runs, everything that ships has its page, what is linked exists, and the site builds."""

import re
import subprocess
import sys
from importlib import import_module, util
from pathlib import Path

import pytest
from click.testing import CliRunner
from documented_code import blocks, commands, run_python

from mpq import exporting, importing, sensitivity, solvers
from mpq import hardware_models as hardware
from mpq.__main__ import main
from mpq.hardware_models.families import FAMILIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MADE = {"_build", "api", "devices", "notebooks", "extensions"}  # made by the build, or tested elsewhere
PAGES = sorted(
    file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md") if file.relative_to(DOCS).parts[0] not in MADE
)
TEXTS = {page: (DOCS / page).read_text(encoding="utf-8") for page in PAGES}
EXTENSIONS = DOCS / "extensions"


def shipped() -> list[tuple[str, str]]:
    """The folder and the name of everything of mpq's own that has a page to itself."""
    return [
        *(("estimators", name) for name in sensitivity.METHODS),
        *(("solvers", name) for name in solvers.SOLVERS),
        *(("hardware", family.name) for family in FAMILIES),
        *(("exporters", name) for name in exporting.TARGETS),
    ]


def toctree(page: str) -> set[str]:
    """What an index lists."""
    listed = "\n".join(blocks(page, "{toctree}"))
    return {line.strip() for line in listed.splitlines() if line.strip() and not line.startswith(":")}


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python(TEXTS[page], page)
    for command in commands(TEXTS[page]):
        result = CliRunner().invoke(main, command.arguments)
        assert result.exit_code == 0, f"mpq {' '.join(command.arguments)}: {result.output}"
        printed = {line.rstrip() for line in result.output.splitlines()}
        assert set(command.shown) <= printed, command.arguments


def test_wrong_code_is_noticed() -> None:
    with pytest.raises(ZeroDivisionError):
        run_python("```python\nx = 1\n```\ntext\n```python\nx / 0\n```\n", "page")
    assert run_python("<!-- not run: slow -->\n```python\nx = 1\n```\n", "page") == {}
    (found,) = commands("```console\n$ mpq show a \\\n    b\nout\n...\n$ pip install x\n```\n")
    assert (found.arguments, found.shown) == (["show", "a", "b"], ["out"])


@pytest.mark.parametrize(("folder", "name"), shipped())
def test_everything_that_ships_has_a_page(folder: str, name: str) -> None:
    directive = "family" if folder == "hardware" else folder.removesuffix("s")
    page = f"{folder}/{name}.md"
    assert page in PAGES, f"docs/{page} is missing: say when to use {name}, when not, and what goes wrong"
    assert f"```{{{directive}}} {name}\n```" in TEXTS[page], f"{page} does not show what the code says of itself"
    assert "## In practice" in TEXTS[page]
    assert name in toctree(TEXTS[f"{folder}/index.md"]), f"docs/{folder}/index.md does not list {name}"


@pytest.mark.parametrize("folder", ["estimators", "solvers", "exporters", "hardware"])
def test_no_page_outlives_what_it_is_about(folder: str) -> None:
    names = {name for place, name in shipped() if place == folder}
    others = {"index", "measured", "importing", "device-files"}
    pages = {page.removeprefix(f"{folder}/").removesuffix(".md") for page in PAGES if page.startswith(f"{folder}/")}
    assert pages - others == names


def test_names_that_the_pages_link_exist() -> None:
    found = [
        (page, dotted)
        for page, text in TEXTS.items()
        for dotted in re.findall(r"{py:\w+}`(?:[^`<]+<)?([\w.]+)>?`", text)
    ]
    assert len(found) > 40
    for page, dotted in found:
        module, _, name = dotted.rpartition(".")
        known = util.find_spec(dotted) if module in {"mpq", "mpq.hardware_models"} else None
        assert known or hasattr(import_module(module), name), f"{page}: {dotted}"


def test_sources_of_imported_plans_are_listed() -> None:
    for name in importing.sources():
        assert f"| `{name}` |" in TEXTS["exporters/importing.md"]


@pytest.fixture
def extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx", reason="pip install 'mpq-search[docs]'")
    monkeypatch.syspath_prepend(str(EXTENSIONS))


def test_devices_and_modules_get_pages(extensions: None) -> None:
    made = import_module("generated_pages").pages()
    for name in hardware.available():
        assert f"{{device}} {name}" in made[f"devices/{name}.md"]
        assert name in toctree(made["devices/index.md"])
    reference = "\n".join(text for path, text in made.items() if path.startswith("api/"))
    folders = {"mpq": "mpq", **{name: f"mpq.{name}" for name in ("solvers", "sensitivity", "hardware_models")}}
    for folder, package in folders.items():
        for file in (ROOT / folder).glob("[!_]*.py"):
            assert f".. automodule:: {package}.{file.stem}\n" in reference


def test_device_pages_show_every_number(extensions: None) -> None:
    written = import_module("plug_in_pages").device("gap8")
    target = hardware.load("gap8")
    assert sum(number.is_estimate for number in target.numbers) == written.count("| ~")
    assert all(f"`{number.key}`" in written for number in target.numbers)
    assert all(source.id in written for source in target.sources)


def test_help_of_every_command(extensions: None) -> None:
    written = import_module("command_help").markdown()
    for path in ("mpq search", "mpq device measure", "mpq export"):
        assert f"## {path}\n" in written
    assert "--budget" in written


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("|x| and *y* are `a_b`s, x_.", [r"\|x\| and \*y\* are `a_b`\ s, x\_."]),
        (
            "Sum.\n\n    s = |x|\n\n    t = *y\n\nEnd.",
            ["Sum.", "", ".. code-block:: text", "", "    s = |x|", "", "    t = *y", "", "End."],
        ),
        ("Args:\n    a: of |x|,\n        int4@token.", ["Args:", r"    a: of \|x\|,", r"        int4\@token."]),
        ("Example:\n    Text:\n\n    >>> a | b\n    c", ["Example:", "    Text:", "", "    >>> a | b", "    c"]),
        (
            "`a b`  hangs\n       over\n`c`  too",
            [".. code-block:: text", "", "    `a b`  hangs", "           over", "    `c`  too"],
        ),
        ("1. one\n   more\n2. `x y`", ["1. one", "   more", "2. ``x y``"]),
    ],
)
def test_docstrings_become_markup(extensions: None, docstring: str, expected: list[str]) -> None:
    converted = import_module("plain_docstrings").converted(docstring.splitlines())
    assert converted[:-1] == expected


@pytest.mark.slow
def test_site_builds_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="pip install 'mpq-search[docs]'")
    for package in ("furo", "myst_parser"):
        pytest.importorskip(package)
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", "-d", tmp_path / "trees", DOCS, tmp_path / "html"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    html = tmp_path / "html"
    pages = {file.relative_to(html).as_posix(): file.read_text("utf-8") for file in html.rglob("*.html")}
    assert {"index.html", "solvers/ilp.html", "devices/gap8.html", "api/mpq.solvers.ilp.html"} <= set(pages)
    assert "KL( softmax(z_j)" in pages["estimators/kl.html"]
    loaded = re.compile(r'<(?:script|img|iframe)\s[^>]*src="(https?:)?//|<link\s[^>]*stylesheet[^>]*href="(https?:)?//')
    assert [name for name, text in pages.items() if loaded.search(text)] == []
