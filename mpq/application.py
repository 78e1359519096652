"""`apply`: a model whose layers are quantised by the library that will run them, in place, and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpq.exported_layers import without_operators
from mpq.exporting import target_named

if TYPE_CHECKING:
    from torch import nn

    from mpq.plan import Plan


def apply(model: nn.Module, plan: Plan, target: str = "torchao", **settings: Any) -> nn.Module:
    """Quantise a model in place as a plan says, with the library that will run it.

    Unlike `mpq.quantized`, which simulates and gives the model back, this replaces the weights: they are what the
    library stores, and the model runs by the library's kernels. Afterwards every layer of the plan is looked at, since
    libraries skip what they cannot pack.

    Args:
        model: in full precision; its planned weights are replaced.
        plan: for this model; `mpq.search(..., target=target)` makes one that the library can hold.
        target: a library that mpq applies: "torchao", or one that another package adds (`mpq.plugins`).
        **settings: of that library's function.

    Returns:
        The model that was given.

    Raises:
        ValueError: if the target applies its plans itself or cannot hold one, or the plan is for another model; the
            model is then as it was.
        RuntimeError: if the library left a layer as it was, or gave it other bits; it names the layers.
        ImportError: if the library is not installed.

    Example:
        In a transformers model, from the checkpoint to quantised weights:

            model = AutoModelForCausalLM.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            data = [tokenizer(text, return_tensors="pt") for text in texts]
            plan = mpq.search(model, data, ["int4@group32", "int8"], {"size": "35%"}, target="torchao")
            mpq.apply(model, plan, "torchao")
    """
    from mpq.surgery import check_model

    library = target_named(target)
    if library.apply is None:
        raise ValueError(
            f"{target} applies its plans with its own tools: mpq.export(plan, {target!r}) is what they read. mpq.apply "
            "is for torchao"
        )
    check_model(model, plan)
    library.apply(model, without_operators(plan, target), **settings)
    return model
