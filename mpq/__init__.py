"""mpq: which layer of a neural network gets which number format, on this hardware, under these budgets.

    plan = mpq.search(model, data, options=["int4", "int8"], budgets={"size": "18%"})
    mpq.verify(model, heldout, plan)
    with mpq.quantized(model, plan): ...
    mpq.export(plan, "torchao")

Names are imported when first used: a saved table is solved without torch, and `import mpq` is instant.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

# A checkout keeps the sub-packages beside this folder, a wheel inside it: either way they are `mpq.<name>`.
if not (_Path(__file__).parent / "solvers").is_dir():
    __path__.append(str(_Path(__file__).parents[1]))

from mpq.version import VERSION as _VERSION

if _TYPE_CHECKING:
    from mpq.accuracy_constraint import smallest
    from mpq.application import apply
    from mpq.comparison import compare
    from mpq.evaluator import Evaluator
    from mpq.evolution import evolve
    from mpq.exporting import export
    from mpq.frontier import Frontier
    from mpq.importing import import_plan
    from mpq.layers import Layer, Network
    from mpq.options import Option, SearchSpace
    from mpq.pipeline import measure, pareto, search
    from mpq.plan import Plan
    from mpq.problem import Allocation, AllocationProblem, InfeasibleError, Proof
    from mpq.refinement import refine
    from mpq.surgery import quantized
    from mpq.tables import CostTable
    from mpq.tracing import trace
    from mpq.verification import verify


__version__ = _VERSION

__all__ = [
    "Allocation",
    "AllocationProblem",
    "CostTable",
    "Evaluator",
    "Frontier",
    "InfeasibleError",
    "Layer",
    "Network",
    "Option",
    "Plan",
    "Proof",
    "SearchSpace",
    "apply",
    "compare",
    "evolve",
    "export",
    "import_plan",
    "measure",
    "pareto",
    "quantized",
    "refine",
    "search",
    "smallest",
    "trace",
    "verify",
]

_HOME = {
    "Allocation": "problem",
    "AllocationProblem": "problem",
    "CostTable": "tables",
    "Evaluator": "evaluator",
    "Frontier": "frontier",
    "InfeasibleError": "problem",
    "Layer": "layers",
    "Network": "layers",
    "Option": "options",
    "Plan": "plan",
    "Proof": "problem",
    "SearchSpace": "options",
    "apply": "application",
    "compare": "comparison",
    "evolve": "evolution",
    "export": "exporting",
    "import_plan": "importing",
    "measure": "pipeline",
    "pareto": "pipeline",
    "quantized": "surgery",
    "refine": "refinement",
    "search": "pipeline",
    "smallest": "accuracy_constraint",
    "trace": "tracing",
    "verify": "verification",
}
_MODULES = (
    *("activation_ranges", "adaquant", "adjuster", "attention_formats", "batch_norm_tuning", "bias_correction"),
    *("budgets", "demo", "drops", "error_database", "fake_quantize", "formats", "gptq", "hardware_models"),
    *("layer_norm_scales", "layers", "options", "plan", "problem", "quantizer", "score_blocks", "sensitivity"),
    *("shared_evaluator", "solvers", "tables", "tasks", "weight_database"),
)


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(_import_module(f"mpq.{_HOME[name]}"), name)
    if name in _MODULES:
        return _import_module(f"mpq.{name}")
    raise AttributeError(f"module 'mpq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
