"""Pages nobody writes: one a module with its docstrings, one a device with its numbers; made anew by every build.

They go to `api/` and `devices/`, which are not kept under version control. A module or device that is new has its
page, and its line in the index, without anybody's doing; one that is gone loses it.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "mpq": "models, options, tables, plans, and what is done with them",
    "mpq.sensitivity": "how much the loss grows when a layer takes an option",
    "mpq.solvers": "a problem in, an allocation with its proof out",
    "mpq.hardware_models": "what every choice costs on a target",
}


def modules() -> dict[str, Path]:
    """Every module by its canonical name: mpq.solvers.ilp for solvers/ilp.py."""
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package.removeprefix("mpq.")).glob("*.py")):
            if not file.stem.startswith("__"):
                found[f"{package}.{file.stem}"] = file
    return found


def public(found: Iterable[str]) -> dict[str, list[str]]:
    """Modules that get a page of their own, a package: those that its public names come from, and those it lists."""
    result = {}
    for package in PACKAGES:
        loaded = import_module(package)
        homes = {getattr(getattr(loaded, name), "__module__", "") for name in loaded.__all__}
        listed = {f"{package}.{name}" for name in getattr(loaded, "_MODULES", ())}
        shipped = {name for name in found if name.endswith("_conformance")} if package == "mpq" else set()
        mine = {name for name in homes | listed | shipped if name.rpartition(".")[0] == package} - set(PACKAGES)
        result[package] = sorted(mine & set(found))
    return result


def package_page(package: str, pages: list[str], inner: list[str]) -> str:
    """The page of a package: what it offers and from where, its pages, and the modules it is made of."""
    loaded = import_module(package)
    page = f"{package}\n{'=' * len(package)}\n\n.. automodule:: {package}\n\nOffers:\n\n"
    for name in sorted(loaded.__all__):
        home = getattr(getattr(loaded, name), "__module__", package)
        page += f"* :py:obj:`{name} <{home}.{name}>`\n"
    own = [name for name in loaded.__all__ if getattr(getattr(loaded, name), "__module__", "") == package]
    page += "\n" + "".join(
        f".. auto{'class' if name[0].isupper() else 'function'}:: {package}.{name}\n\n" for name in own
    )
    listed = "\n".join(f"   {name}" for name in pages)
    page += f".. toctree::\n   :maxdepth: 1\n\n{listed}\n   {package}-inside\n"
    return page


def inside_page(package: str, inner: list[str]) -> str:
    """What the other modules of a package are for: their docstrings, without their members."""
    title = f"Inside {package}"
    parts = [f"{name}\n{'-' * len(name)}\n\n.. automodule:: {name}\n\n" for name in inner]
    return f"{title}\n{'=' * len(title)}\n\nHow it is made; names in here may change.\n\n" + "".join(parts)


def module_page(name: str) -> str:
    """The page of a module with all it holds."""
    return f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n   :members:\n"


def api_pages() -> dict[str, str]:
    """The pages of the reference by their path."""
    found = modules()
    made = {}
    for package, pages in public(found).items():
        inner = [name for name in found if name.rpartition(".")[0] == package and name not in {*pages, *PACKAGES}]
        made |= {f"api/{name}.rst": module_page(name) for name in pages}
        made[f"api/{package}.rst"] = package_page(package, pages, inner)
        made[f"api/{package}-inside.rst"] = inside_page(package, inner)
    return made | {"api/index.md": api_index()}


def api_index() -> str:
    """The index of the reference."""
    about = "".join(f"- [{package}]({package}.rst): {text}\n" for package, text in PACKAGES.items())
    listed = "\n".join(PACKAGES)
    return (
        "# API reference\n\nFrom the docstrings, a page a module. Names are imported when first used: `mpq.search` "
        "lives in\n`mpq.pipeline`, and the page of a package says where each of its names is described.\n\n"
        f"{about}\n```{{toctree}}\n:hidden:\n:maxdepth: 1\n\n{listed}\n```\n"
    )


def device_index(names: list[str]) -> str:
    """The index of the devices that ship."""
    toctree = "\n".join(names)
    return (
        "# Devices\n\nA device file is a chip and a runtime. Every number has a unit and a source; a number that "
        "rests\non an estimate is marked ~, and so are the results that used it.\n\n"
        f"```{{toctree}}\n:maxdepth: 1\n\n{toctree}\n```\n"
    )


def pages() -> dict[str, str]:
    """Every generated page by its path in this folder."""
    from mpq import hardware_models

    devices = hardware_models.available()
    made = api_pages() | {f"devices/{name}.md": f"# {name}\n\n```{{device}} {name}\n```\n" for name in devices}
    return made | {"devices/index.md": device_index(devices)}


def write(app: Any) -> None:
    """Write what changed and remove what is gone."""
    made = pages()
    for folder in ("api", "devices"):
        (Path(app.srcdir) / folder).mkdir(exist_ok=True)
        for file in (Path(app.srcdir) / folder).iterdir():
            if f"{folder}/{file.name}" not in made:
                file.unlink()
    for path, text in made.items():
        file = Path(app.srcdir) / path
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, Any]:
    """Connect before Sphinx looks for pages."""
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
