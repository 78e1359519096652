"""Other packages' estimators, solvers, devices and export targets: by name, with what is wrong told, and conforming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import tomllib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import mpq
from mpq import hardware_models, plugins, sensitivity, solvers
from mpq.__main__ import main
from mpq.device_conformance import DeviceConformance
from mpq.estimator_conformance import EstimatorConformance
from mpq.exporter_conformance import ExporterConformance, linear_layer, plan_of
from mpq.exporting import ExportTarget, targets
from mpq.options import Option, SearchSpace
from mpq.problem import AllocationProblem
from mpq.solver_conformance import SolverConformance

EXAMPLE = Path(__file__).parent / "example_plugin"
SMALL = AllocationProblem(
    objective=[[5.0, 1.0], [3.0, 0.5]], resources={"size": [[2.0, 4.0], [4.0, 8.0]]}, budgets={"size": 9.0}
)
LAYER = linear_layer("fc", 8, 8)


def install(folder: Path, name: str, version: str, points: dict[str, dict[str, str]], module: str = "") -> None:
    """What an installer leaves: the metadata with entry points, and one module."""
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    sections = (f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in own.items()) for group, own in points.items())
    (information / "entry_points.txt").write_text("\n".join(sections))
    if module:
        (folder / f"{name.replace('-', '_')}.py").write_text(textwrap.dedent(module))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a package for the length of a test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def of(name, points, module="", version="1.0"):
        install(tmp_path, name, version, points, module)
        plugins._installed.cache_clear()

    yield of
    plugins._installed.cache_clear()
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def install_example(folder: Path) -> None:
    """The example package as `pip install` leaves it: its module, and metadata that say what its pyproject does."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text("utf-8"))["project"]
    install(folder, project["name"], project["version"], project["entry-points"])
    (folder / "mpq_example_plugin.py").write_text((EXAMPLE / "mpq_example_plugin.py").read_text("utf-8"))


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example package, installed."""
    folder = tmp_path_factory.mktemp("site")
    install_example(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        plugins._installed.cache_clear()
        yield import_module("mpq_example_plugin")
    plugins._installed.cache_clear()
    del sys.modules["mpq_example_plugin"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment of another process that has the example package."""
    folder = tmp_path_factory.mktemp("site")
    install_example(folder)
    path = [str(folder), str(Path(mpq.__file__).parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def command(environment, *arguments):
    """What `mpq` prints in a process of its own."""
    line = [sys.executable, "-m", "mpq", *arguments]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(*arguments):
    """What `mpq` prints in this process."""
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == 0, done.output
    return done.stdout


def model_and_data():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), [torch.randn(16, 8)]


# -- the example package -----------------------------------------------------------------------------------------------


def test_all_four_by_name_in_python(example):
    model, data = model_and_data()
    assert "example-error" in sensitivity.available()
    assert "example-every" in solvers.available()
    assert "example-chip" in hardware_models.available()
    assert "example-lines" in targets()
    plan = mpq.search(
        model,
        data,
        options=["int4", "int6", "int8"],
        budgets={"latency": "80%", "size": "60%"},
        hardware="example-chip",
        sensitivity="example-error",
        solver="example-every",
        target="example-lines",
        progress=False,
    )
    assert plan.provenance["sensitivity"] == "LargestError(power=2.0)"
    assert plan.proof.status == "optimal"
    exported = mpq.export(plan, "example-lines")
    assert exported == {entry.layer.name: str(entry.choice) for entry in plan.entries}
    assert set(exported.values()) <= {"int4", "int8"}  # int6 was no option: the target cannot hold it
    macs, bits = plan.table.layers[0].macs, plan.entries[0].choice.weight.bits
    latency = plan.table.quantities["latency"][0, [*plan.table.options].index(str(plan.entries[0].choice))]
    assert latency == pytest.approx(macs / 16 * bits * 32 / 1e12)


def test_settings_are_those_of_the_class(example):
    assert solvers.solve(SMALL, "example-every", limit=4).choices.tolist() == [1, 0]
    with pytest.raises(ValueError, match="3 plans at most"):
        solvers.solve(SMALL, "example-every", limit=3)
    with pytest.raises(TypeError, match="limits"):
        solvers.solve(SMALL, "example-every", limits=3)
    model, data = model_and_data()
    given = model, data, mpq.trace(model, data[0]), SearchSpace(["int4", "int8"]), "example-error"
    plain = sensitivity.estimate(*given, progress=False, power=1.0)["sensitivity"]
    np.testing.assert_allclose(sensitivity.estimate(*given, progress=False)["sensitivity"], plain**2)
    with pytest.raises(ValueError, match="settings of example-error must be its fields.*force"):
        sensitivity.estimate(*given, force=1.0)


def test_mistyped_names_find_them(example):
    model, data = model_and_data()
    with pytest.raises(ValueError, match="did you mean 'example-every'"):
        solvers.solve(SMALL, "example-evry")
    with pytest.raises(ValueError, match="did you mean 'example-chip'"):
        hardware_models.load("example-chp")
    with pytest.raises(ValueError, match="did you mean 'example-lines'"):
        mpq.export(plan_of({LAYER: Option("int8")}), "example-line")
    with pytest.raises(ValueError, match="did you mean 'example-error'"):
        sensitivity.estimate(model, data, mpq.trace(model, data[0]), SearchSpace(["int4"]), "example-eror")


def test_another_process_lists_them(environment):
    listed = command(environment, "list")
    for name in ("example-error", "example-every", "example-chip", "example-lines"):
        assert name in listed
    assert " ".join(listed.split()).count("[mpq-example-plugin 1.0]") == 4
    rows = json.loads(command(environment, "list", "devices", "--json"))["devices"]
    ours = {row["distribution"] for row in rows if row["entry_point"] is None}
    [theirs] = [row for row in rows if row["entry_point"]]
    assert ours == {plugins.OURS}
    assert theirs == {
        "name": "example-chip",
        "what": "asic, bit-serial, 1e12 a second",
        "distribution": "mpq-example-plugin 1.0",
        "entry_point": "mpq_example_plugin:example_chip",
        "problem": None,
    }


def test_the_command_line_takes_them(example, tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "def load():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)).eval(), [torch.randn(16, 8)]\n"
    )
    chosen = ("--sensitivity", "example-error", "--solver", "example-every", "--hardware", "example-chip")
    asked = ("--target", "example-lines", "--options", "int4,int8", "--budget", "latency=20%", "--output", "plan.json")
    monkeypatch.chdir(tmp_path)
    assert "proof: optimal" in run("search", "net.py:load", *chosen, *asked)
    lines = run("export", "plan.json", "example-lines").splitlines()
    assert sorted(line.split()[0] for line in lines) == ["0", "1"]
    assert "1e+12 bit operations a second" in run("device", "show", "example-chip")


class TestExampleEstimator(EstimatorConformance):
    @pytest.fixture
    def estimator(self, example):
        return example.LargestError()


class TestExampleSolver(SolverConformance):
    kinds = ("ties", "forbidden", "negative", "whole", "norm")
    seeds = range(12)

    @pytest.fixture
    def solver(self, example):
        return example.EveryPlan()


class TestExampleDevice(DeviceConformance):
    @pytest.fixture
    def device(self, example):
        return hardware_models.load("example-chip")


class TestExampleExporter(ExporterConformance):
    @pytest.fixture
    def exporter(self, example):
        return example.LINES


# -- what can go wrong -------------------------------------------------------------------------------------------------


def test_importing_mpq_looks_for_no_plug_in():
    code = (
        "import sys, mpq, mpq.solvers, mpq.hardware_models, mpq.plugins\n"
        "print(mpq.plugins._installed.cache_info().misses, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(mpq.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]


BROKEN = {
    "mpq.estimators": {"broken": "no_such_module_of_acme:Method"},
    "mpq.solvers": {"broken": "acme_mpq:Missing", "silent": "acme_mpq:Silent", "number": "acme_mpq:NUMBER"},
    "mpq.hardware": {"broken": "acme_mpq:device", "nowhere": "acme_mpq:PATH", "wrong": "acme_mpq:wrong"},
    "mpq.exporters": {"broken": "acme_mpq:NUMBER"},
}
ACME = """
    NUMBER = 3
    PATH = "no-such-folder/nowhere.toml"
    class Silent:
        solve = None
    def device():
        raise KeyError("no chip")
    def wrong():
        return 3
"""


def test_a_broken_package_is_an_error_when_named_and_only_then(installed):
    installed("acme-mpq", BROKEN, ACME)
    model, data = model_and_data()
    assert solvers.solve(SMALL, "ilp").choices.tolist() == [1, 0]
    assert hardware_models.load("gap8").name == "gap8"
    with pytest.raises(ValueError, match=r"'broken' of acme-mpq 1.0 \(entry point broken = 'acme_mpq:Missing'.*Attrib"):
        solvers.solve(SMALL, "broken")
    for name in ("silent", "number"):
        with pytest.raises(ValueError, match=f"solver '{name}' of acme-mpq 1.0 .*must be a class with a method solve"):
            solvers.solve(SMALL, name)
    with pytest.raises(ValueError, match=r"'broken' of acme-mpq.*ModuleNotFoundError.*no_such_module_of_acme"):
        sensitivity.estimate(model, data, mpq.trace(model, data[0]), SearchSpace(["int4"]), "broken")
    with pytest.raises(ValueError, match=r"device 'broken' of acme-mpq 1.0.*KeyError: 'no chip'"):
        hardware_models.load("broken")
    with pytest.raises(ValueError, match=r"device 'nowhere' of acme-mpq.*cannot read the device file"):
        hardware_models.load("nowhere")
    with pytest.raises(ValueError, match=r"device 'wrong' of acme-mpq.*must lead to a Target, got 3"):
        hardware_models.load("wrong")
    with pytest.raises(ValueError, match=r"'broken' of acme-mpq.*must be an mpq.exporting.ExportTarget, got 3"):
        mpq.export(plan_of({LAYER: Option("int8")}), "broken")


def test_the_list_marks_what_is_broken_and_goes_on(installed):
    installed("acme-mpq", BROKEN, ACME)
    found = json.loads(run("list", "--json"))
    problems = {
        kind: {row["name"]: row["problem"] for row in found[kind] if row["problem"]} for kind in list(found)[1:]
    }
    assert {kind: set(rows) for kind, rows in problems.items()} == {
        "methods": {"broken"},
        "solvers": {"broken", "silent", "number"},
        "devices": {"broken", "nowhere", "wrong"},
        "exports": {"broken"},
    }
    assert "no_such_module_of_acme" in problems["methods"]["broken"]
    listed = run("list")
    assert listed.count("BROKEN: ") == 8
    assert all(name in listed for name in ("ilp", "nvidia-t4", "torchao", "output_fisher"))


def test_a_name_of_two_packages_is_an_error_that_names_both(installed):
    points = {"mpq.solvers": {"ilp": "acme_mpq:Solver", "fast": "acme_mpq:Solver"}}
    installed("acme-mpq", points, "class Solver:\n    def solve(self, problem): ...")
    installed("other-mpq", {"mpq.solvers": {"fast": "other_mpq:Solver"}}, version="2.1")
    with pytest.raises(ValueError, match=r"'ilp' is of two packages, mpq-search .* and acme-mpq 1.0 .*: uninstall one"):
        solvers.solve(SMALL, "ilp")
    with pytest.raises(ValueError, match=r"'fast' is of two packages, acme-mpq 1.0 .* and other-mpq 2.1"):
        solvers.solve(SMALL, "fast")
    assert solvers.solve(SMALL, solvers.ILPSolver()).choices.tolist() == [1, 0]
    assert solvers.available().count("ilp") == 1
    assert " ".join(run("list", "solvers").split()).count("is of two packages") == 3


def test_auto_is_ours_whatever_calls_itself_so(installed):
    installed("acme-mpq", {"mpq.solvers": {"auto": "acme_mpq:X"}, "mpq.estimators": {"auto": "acme_mpq:X"}})
    assert solvers.solve(SMALL).proof.status == "optimal"
    assert solvers.available().count("auto") == 1
    assert "auto" not in sensitivity.available()
    model, data = model_and_data()
    assert mpq.search(model, data, ["int4", "int8"], {"size": "90%"}, progress=False).proof.status == "optimal"


def test_broken_metadata_of_any_package_is_passed_over(installed, tmp_path):
    installed("acme-mpq", {"mpq.solvers": {"fast": "acme_mpq:Solver"}})
    (tmp_path / "bad-1.0.dist-info").mkdir()
    (tmp_path / "bad-1.0.dist-info" / "entry_points.txt").write_text("[mpq.solvers]\nthis is no entry point\n")
    (tmp_path / "worse-1.0.dist-info").mkdir()
    (tmp_path / "worse-1.0.dist-info" / "entry_points.txt").write_bytes(b"[mpq.solvers]\n\xff\xfe\n")
    plugins._installed.cache_clear()
    assert "fast" in solvers.available()
    assert solvers.solve(SMALL, "greedy").choices.tolist() == [1, 0]


def test_the_first_of_a_package_on_the_path_counts(installed, tmp_path, monkeypatch):
    installed("acme-mpq", {"mpq.solvers": {"fast": "acme_mpq:Solver"}})
    install(tmp_path / "behind", "Acme_mpq", "0.9", {"mpq.solvers": {"fast": "acme_mpq:Old"}})
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "behind")])
    fast = [plugin.distribution for plugin in plugins.plugins("mpq.solvers") if plugin.name == "fast"]
    assert fast == ["acme-mpq 1.0"]


DEVICES = """
    from importlib.resources import files
    from pathlib import Path
    HERE = Path(__file__).parent / "chips"
    FILE = str(HERE / "chip.toml")
    class Priced:
        '''A chip of ours.

        Its prices come from a simulator.
        '''
        name = "own"
        def costs(self, network, space, batch=1, phase=None, context=None, *, bops="hawq"):
            raise NotImplementedError
"""


def test_a_device_may_be_a_file_a_package_a_function_or_an_object(installed, tmp_path):
    chips = tmp_path / "acme_chips"
    chips.mkdir()
    text = (Path(hardware_models.__file__).parent / "gap8.toml").read_text("utf-8")
    (chips / "__init__.py").write_text("")
    (chips / "in-package.toml").write_text(text.replace('name = "gap8"', 'name = "in-package"'))
    (tmp_path / "chips").mkdir()
    (tmp_path / "chips" / "chip.toml").write_text(text.replace('name = "gap8"', 'name = "chip"'))
    points = {
        "in-package": "acme_chips",
        "chip": "acme_mpq:FILE",
        "class": "acme_mpq:Priced",
    }
    installed("acme-mpq", {"mpq.hardware": points}, DEVICES)
    assert hardware_models.load("in-package").name == "in-package"
    assert hardware_models.load("chip").name == "chip"
    assert hardware_models.load("class").name == "own"
    assert set(points) <= set(hardware_models.available())
    shown = CliRunner().invoke(main, ["device", "show", "class"])
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    assert text.startswith("own: kind not told, runtime not told A chip of ours. Priced by acme_mpq.Priced.costs of")
    assert "acme-mpq 1.0 (entry point class" in text
    assert "shows no numbers" in text
    answer = json.loads(CliRunner().invoke(main, ["device", "show", "class", "--json"]).stdout)
    whole = json.loads(CliRunner().invoke(main, ["device", "show", "gap8", "--json"]).stdout)
    assert list(answer) == list(whole)
    assert (answer["name"], answer["numbers"], answer["models"], answer["sources"]) == ("own", [], [], [])
    assert "A chip of ours." in answer["notes"]


def test_a_family_of_its_own_reads_a_device_file():
    from mpq.hardware_models.device_file import FAMILIES, parse_target
    from mpq.hardware_models.device_schema import TableSchema, number
    from mpq.hardware_models.prices import Family, Prices

    class Slow:
        def __init__(self, seconds):
            self.seconds, self.limits = seconds, {}

        def price(self, cells, so_far):
            return Prices(tables={"latency": np.full(cells.shape, self.seconds)}, measures={"latency": "s"})

        def describe(self):
            return []

    keys = (number("seconds", "seconds a layer", "seconds", required=True),)
    read = lambda tables: Slow(tables["slow"][0]["seconds"]) if tables["slow"] else None  # noqa: E731
    family = Family("slow", {"slow": TableSchema(keys)}, read)
    text = """
schema = 1
[target]
name = "slow"
kind = "asic"
runtime = "none"
[[source]]
id = "guess"
title = "from memory"
kind = "estimate"
read = "2026"
[slow]
seconds = 2.0
source = "guess"
"""
    target = parse_target(text, "slow.toml", families=(*FAMILIES, family))
    network = mpq.Network((LAYER,), total_bytes=256)
    assert (target.costs(network, SearchSpace(["int8"]))["latency"] == 2.0).all()
    with pytest.raises(ValueError, match="unknown table or key 'slow'"):
        parse_target(text, "slow.toml")


def test_objects_and_functions_are_taken_as_they_are(installed):
    installed(
        "acme-mpq",
        {"mpq.solvers": {"one": "acme_mpq:ONE"}, "mpq.estimators": {"count": "acme_mpq:count"}},
        """
        import numpy as np
        class _One:
            def solve(self, problem):
                return problem.allocation([1, 0], status="heuristic")
        ONE = _One()
        def count(measurement):
            from mpq.sensitivity import Scores
            mean = measurement.empty()
            mean[:] = np.arange(mean.size).reshape(mean.shape)
            return Scores(mean, np.zeros_like(mean), "score")
        """,
    )
    assert solvers.solve(SMALL, "one").choices.tolist() == [1, 0]
    with pytest.raises(TypeError, match="takes no settings, got .'gap'"):
        solvers.solve(SMALL, "one", gap=0.1)
    model, data = model_and_data()
    frame = sensitivity.estimate(
        model, data, mpq.trace(model, data[0]), SearchSpace(["int4", "int8"]), "count", progress=False
    )
    assert frame["sensitivity"].tolist() == [0, 1, 2, 3]


def test_only_targets_that_can_be_applied_are(installed):
    model, data = model_and_data()
    plan = mpq.search(model, data, ["int8"], {"size": "90%"}, progress=False)
    with pytest.raises(ValueError, match=r"hawq applies its plans with its own tools: mpq.export\(plan, 'hawq'\)"):
        mpq.apply(model, plan, "hawq")
    installed(
        "acme-mpq",
        {"mpq.exporters": {"zeros": "acme_mpq:ZEROS"}},
        """
        from mpq.exporting import ExportTarget
        def zero(model, plan):
            for entry in plan.entries:
                model.get_parameter(entry.layer.weight_name).data.zero_()
        ZEROS = ExportTarget(emit=lambda plan: {"zeros": True}, refused=lambda layer, option: None, apply=zero)
        """,
    )
    assert mpq.apply(model, plan, "zeros") is model
    assert float(model[0].weight.abs().sum()) == 0
    assert isinstance(import_module("acme_mpq").ZEROS, ExportTarget)
