"""Run the notebooks and write what they show to docs/notebooks: `make notebooks`, or with names, `... 02 05`.

The sources in notebooks/ hold no outputs. A rendered page is Markdown with pictures beside it, and says in its first
line which source it was made from, so that a test can tell when it no longer belongs to it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCES, PAGES = ROOT / "notebooks", ROOT / "docs" / "notebooks"
SETTINGS = "figure.dpi: 90\nfont.size: 9\naxes.spines.top: False\naxes.spines.right: False\n"  # of matplotlib
COLOURS = 128  # of a picture
SECONDS = 600  # a cell may take


def digest(source: Path) -> str:
    """What a rendered page is known by: a hash of the source's text, whatever its line ends."""
    return hashlib.sha256(source.read_text("utf-8").encode()).hexdigest()[:16]


def first_line(source: Path) -> str:
    """The line that a page of this source begins with."""
    return f"<!-- Made by docs/render_notebooks.py from notebooks/{source.name}, {digest(source)}: edit that. -->"


def executed(source: Path) -> Any:
    """The notebook with outputs, run in a folder of its own that is gone afterwards.

    Raises:
        CellExecutionError: if a cell fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.reads(source.read_text("utf-8"), as_version=4)  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder, _places(Path(folder)):
        work = Path(folder, "work")
        work.mkdir()
        Path(work, "matplotlibrc").write_text(SETTINGS, "utf-8")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        own = {"OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "110", "MPLCONFIGDIR": str(work), "PYTHONPATH": path}
        client = NotebookClient(
            notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(work)}}
        )
        client.execute(env={**os.environ, **own})
    return notebook


@contextmanager
def _places(folder: Path) -> Iterator[None]:
    """Jupyter's files in a folder, as long as this lasts, for this process and the kernels it starts."""
    names = ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: str(folder / name) for name in names})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@dataclass
class Page:
    """A page in the making: its name, text and pictures by file name."""

    name: str
    pictures: dict[str, bytes] = field(default_factory=dict)

    def text(self, notebook: Any) -> str:
        """The Markdown of a notebook with outputs."""
        return "\n\n".join(part for cell in notebook.cells for part in self._cell(cell)) + "\n"

    def _cell(self, cell: Any) -> Iterator[str]:
        if cell.cell_type == "markdown":
            yield cell.source.strip()
            return
        yield _code(cell.source.strip())
        streams = [output for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"]
        printed = "".join(output.text for output in streams)  # warnings name folders of the machine
        if printed.strip():
            yield _block(printed)
        for output in cell.outputs:
            if output.output_type in ("display_data", "execute_result"):
                yield self._shown(output.data)

    def _shown(self, data: Any) -> str:
        """The best that a page can show of an output."""
        if "image/png" in data:
            file = f"{self.name}_{len(self.pictures) + 1}.png"
            self.pictures[file] = _smaller(base64.b64decode(data["image/png"]))
            return f"![A picture of the cell above]({file})"
        if "application/vnd.plotly.v1+json" in data:
            return "*(An interactive picture: open the notebook to turn it and to move its slider.)*"
        if "text/markdown" in data:
            return str(data["text/markdown"]).strip()
        if "text/html" in data and "<table" in data["text/html"]:
            return _table(data["text/html"])
        return _block(data["text/plain"])


def _code(source: str) -> str:
    """The source of a cell; of one that writes a file the file."""
    if written := re.match(r"%%writefile (\S+\.(\w+))\n", source):
        language = {"py": "python"}.get(written[2], written[2])
        return f"`{written[1]}`:\n\n```{language}\n{source[written.end() :]}\n```"
    return f"```python\n{source}\n```"


def _block(text: str) -> str:
    plain = "\n".join(line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip().splitlines())
    return f"```text\n{plain}\n```"


def _table(html: str) -> str:
    """HTML as one block of Markdown: no style sheet, no empty line, no indentation."""
    bare = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL).replace(' border="1" class="dataframe"', "")
    return "\n".join(line.strip() for line in bare.splitlines() if line.strip())


def _smaller(png: bytes) -> bytes:
    """The picture with few colours."""
    from PIL import Image

    written = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    image.save(written, "PNG", optimize=True)
    return written.getvalue()


def render(source: Path) -> None:
    """Run a notebook and write its page; pictures of an older one go."""
    page = Page(source.stem)
    text = page.text(executed(source))
    PAGES.mkdir(exist_ok=True)
    for old in PAGES.glob(f"{source.stem}_*.png"):
        old.unlink()
    for file, content in page.pictures.items():
        (PAGES / file).write_bytes(content)
    (PAGES / f"{source.stem}.md").write_text(f"{first_line(source)}\n\n{text}", "utf-8")


def main(names: list[str]) -> None:
    """Render all notebooks, or those whose names begin so."""
    for source in sorted(SOURCES.glob("*.ipynb")):
        if not names or source.name.startswith(tuple(names)):
            render(source)
            sys.stdout.write(f"{source.name}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
