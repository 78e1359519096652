"""The four folders are one package: in the wheel, in a checkout that is installed, and in one that is not."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("mpq", "solvers", "sensitivity", "hardware_models")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]

# Imports from all folders that need not torch, one device file, and where everything came from.
PROBE = """
import sys
import mpq, mpq.solvers.ilp, mpq.hardware_models, mpq.sensitivity, mpq.plan
assert mpq.hardware_models.load(mpq.hardware_models.available()[0])
assert not {"solvers", "sensitivity", "hardware_models"} & set(sys.modules), "second copies"
print(*(module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "mpq"), sep="\\n")
"""


def run(*arguments: str, cwd: Path, path: list[Path]) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with nothing but `path` on PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def inside_package(path: Path) -> str:
    """Where a file of the checkout belongs in the wheel: mpq/solvers/ilp.py for solvers/ilp.py."""
    return path.as_posix() if path.parts[0] == "mpq" else f"mpq/{path.as_posix()}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a commit of everything would hold, so that builds leave nothing in the real one."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip(f"needs a git checkout: {listing.stderr.strip()}")
    copy = tmp_path_factory.mktemp("checkout")
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():  # else deleted but not yet committed
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a second copy: building leaves files behind."""
    pytest.importorskip("build", reason="builds a wheel")
    pytest.importorskip("setuptools", minversion="77", reason="builds a wheel without a network")
    workshop = tmp_path_factory.mktemp("workshop")
    shutil.copytree(checkout, workshop / "source")
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", "..", ".", cwd=workshop / "source", path=[])
    (file,) = workshop.glob("*.whl")
    return zipfile.ZipFile(file)


def test_folders_are_flat() -> None:
    """A nested package would drop out of the wheel."""
    nested = [file.relative_to(ROOT) for folder in FOLDERS for file in (ROOT / folder).glob("*/**/*.py")]
    assert not nested


def test_packages_are_the_folders() -> None:
    names = {folder: folder if folder == "mpq" else f"mpq.{folder}" for folder in FOLDERS}
    assert SETUPTOOLS["packages"] == list(names.values())
    assert SETUPTOOLS["package-dir"] == {name: folder for folder, name in names.items()}
    for folder in FOLDERS:
        assert (ROOT / folder / "__init__.py").is_file()


def test_wheel_holds_the_folders_and_nothing_else(wheel: zipfile.ZipFile, checkout: Path) -> None:
    files = [
        file.relative_to(checkout) for folder in FOLDERS for file in (checkout / folder).rglob("*") if file.is_file()
    ]
    expected = {inside_package(file): file for file in files if not file.name.startswith(".")}
    assert {".py", ".toml", ".json", ".safetensors"} <= {file.suffix for file in files}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == set(expected)
    assert "mpq/py.typed" in packed
    for name, file in expected.items():
        assert wheel.read(name) == (checkout / file).read_bytes(), name


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    information = {name.split("/", 1)[1]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert f"Name: {PROJECT['project']['name']}" in wheel.read(information["METADATA"]).decode().splitlines()
    assert "mpq = mpq.__main__:main" in wheel.read(information["entry_points.txt"]).decode().splitlines()
    assert wheel.read(information["licenses/LICENSE"]) == (ROOT / "LICENSE").read_bytes()


def test_unpacked_wheel_imports_itself(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "installed")
    (tmp_path / "elsewhere").mkdir()
    output = run("-P", "-c", PROBE, cwd=tmp_path / "elsewhere", path=[tmp_path / "installed"]).stdout
    files = {Path(line) for line in output.splitlines()}
    assert tmp_path / "installed/mpq/solvers/ilp.py" in files
    assert {file for file in files if not file.is_relative_to(tmp_path / "installed/mpq")} == set()


@pytest.mark.parametrize("start", ["root", "elsewhere"])
def test_checkout_works_without_installing(start: str, checkout: Path, tmp_path: Path) -> None:
    """-S leaves out the .pth files, and so the finder of an editable install, of the libraries' folders."""
    libraries = [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]
    cwd, path = (checkout, libraries) if start == "root" else (tmp_path, [checkout, *libraries])
    files = {Path(line) for line in run("-S", "-c", PROBE, cwd=cwd, path=path).stdout.splitlines()}
    assert {checkout / "mpq/plan.py", checkout / "solvers/ilp.py", checkout / "hardware_models/__init__.py"} <= files
    assert {file for file in files if not file.is_relative_to(checkout)} == set()
    assert "mpq, version" in run("-S", "-m", "mpq", "--version", cwd=cwd, path=path).stdout


def test_help_imports_neither_torch_nor_pandas(checkout: Path, tmp_path: Path) -> None:
    done = run("-X", "importtime", "-m", "mpq", "--help", cwd=tmp_path, path=[checkout])
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "Usage:" in done.stdout
    assert "search" in done.stdout
    assert {"mpq", "click"} <= imported
    assert not {"torch", "pandas"} & imported
