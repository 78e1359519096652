"""The notebooks run from their sources, which hold no outputs, and the pages made of them are not out of date."""

import base64
import importlib.util
import io
import json
import re
import resource
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the extra mpq-search[test] is not installed")
pytest.importorskip("nbclient", reason="the extra mpq-search[test] is not installed")
pytest.importorskip("ipykernel", reason="the extra mpq-search[test] is not installed")

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [source.stem for source in SOURCES]
CPU_SECONDS = 180  # three quarters of two minutes on two cores
PICTURE_BYTES = 60_000


def script():
    specification = importlib.util.spec_from_file_location("render_notebooks", ROOT / "docs" / "render_notebooks.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # where dataclasses look
    specification.loader.exec_module(module)
    return module


rendering = script()


def pictures_in(text):
    return re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)


def check_pictures(text, content_of):
    for name in pictures_in(text):
        content = content_of(name)
        assert content.startswith(b"\x89PNG"), name
        assert len(content) <= PICTURE_BYTES, f"{name} has {len(content)} bytes"


def test_the_six_are_there():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_a_source_has_no_outputs_and_ids_that_stay(source):
    notebook = json.loads(source.read_text("utf-8"))
    nbformat.validate(notebook)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], cell["id"]
            assert cell["execution_count"] is None, cell["id"]


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_its_page_was_made_from_this_source(source):
    page = rendering.PAGES / f"{source.stem}.md"
    text = page.read_text("utf-8")
    assert text.partition("\n")[0] == rendering.first_line(source), f"{page.name} is out of date: make notebooks"
    assert sorted(pictures_in(text)) == sorted(file.name for file in page.parent.glob(f"{source.stem}_*.png"))
    assert pictures_in(text)
    check_pictures(text, lambda name: (page.parent / name).read_bytes())


def test_there_are_no_pages_of_notebooks_that_are_gone():
    assert sorted(page.stem for page in rendering.PAGES.glob("[0-9]*.md")) == NAMES


def test_a_changed_source_makes_its_page_out_of_date(tmp_path):
    copy = tmp_path / SOURCES[0].name
    copy.write_text(SOURCES[0].read_text("utf-8"), "utf-8")
    assert rendering.first_line(copy) == rendering.first_line(SOURCES[0])
    copy.write_text(SOURCES[0].read_text("utf-8").replace("budget", "limit", 1), "utf-8")
    assert rendering.first_line(copy) != rendering.first_line(SOURCES[0])


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_a_notebook_runs(source):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    notebook = rendering.executed(source)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert 1 < seconds < CPU_SECONDS, f"{seconds:.0f} CPU seconds"
    page = rendering.Page(source.stem)
    text = page.text(notebook)
    check_pictures(text, page.pictures.__getitem__)
    shown = pictures_in((rendering.PAGES / f"{source.stem}.md").read_text("utf-8"))
    assert list(page.pictures) == shown, "the page has other pictures: make notebooks"
    assert str(ROOT) not in text


# -- the script ------------------------------------------------------------------------------------------------------


def shown(**output):
    cell = nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output(**output)])
    page = rendering.Page("it")
    return page.text(nbformat.v4.new_notebook(cells=[cell])), page.pictures


def test_text_is_shown_without_colours_and_what_goes_to_stderr_is_not():
    text, _ = shown(output_type="stream", name="stdout", text="\x1b[1mbold\x1b[0m  \n")
    assert text == "```python\nx\n```\n\n```text\nbold\n```\n"
    text, _ = shown(output_type="stream", name="stderr", text="a warning with a path")
    assert text == "```python\nx\n```\n"


def test_tables_lose_what_a_page_cannot_hold():
    html = '<style scoped>\n.x {}\n</style>\n<table border="1" class="dataframe">\n\n  <tr><td>1</td></tr>\n</table>'
    text, _ = shown(output_type="execute_result", data={"text/html": html, "text/plain": "frame"})
    assert text.endswith("\n\n<table>\n<tr><td>1</td></tr>\n</table>\n")


def test_a_picture_is_written_beside_the_page_and_made_smaller():
    image = pytest.importorskip("PIL.Image", reason="comes with matplotlib")
    picture, written = image.effect_noise((200, 200), 50).convert("RGB"), io.BytesIO()
    picture.save(written, "PNG")
    data = {"image/png": base64.b64encode(written.getvalue()).decode(), "text/plain": "<Figure>"}
    text, pictures = shown(output_type="display_data", data=data)
    assert pictures_in(text) == list(pictures) == ["it_1.png"]
    assert len(pictures["it_1.png"]) < len(written.getvalue())
    assert image.open(io.BytesIO(pictures["it_1.png"])).size == (200, 200)


def test_a_cell_that_writes_a_file_is_shown_as_that_file():
    cells = [nbformat.v4.new_code_cell(f"%%writefile {name}\nx = 1") for name in ("a.toml", "b.py")]
    text = rendering.Page("it").text(nbformat.v4.new_notebook(cells=cells))
    assert text == "`a.toml`:\n\n```toml\nx = 1\n```\n\n`b.py`:\n\n```python\nx = 1\n```\n"


def test_an_interactive_picture_leaves_a_note():
    data = {"application/vnd.plotly.v1+json": {"data": []}, "text/html": "<table></table>", "text/plain": "Figure"}
    assert "interactive" in shown(output_type="display_data", data=data)[0].splitlines()[-1]


def test_a_failing_cell_fails(tmp_path):
    source = tmp_path / "fails.ipynb"
    cells = [nbformat.v4.new_code_cell("from pathlib import Path\nprint(len(list(Path().iterdir())))\n1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), source)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        rendering.executed(source)
