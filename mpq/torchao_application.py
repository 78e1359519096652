"""A plan applied by torchao's `quantize_`, and a look at every weight that comes out."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from mpq.export_torchao import to_torchao
from mpq.exported_layers import is_unquantised, module_names
from mpq.formats import Integer
from mpq.options import Option
from mpq.plan import Entry, Plan, weight_format

if TYPE_CHECKING:
    from torch import Tensor, nn

_FLOAT8 = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


def apply_by_torchao(model: nn.Module, plan: Plan) -> None:
    """Quantise a model in place by torchao.

    Weights of int2 to int7 take a byte each in memory (torchao's format UNPACKED_TO_INT8, which runs everywhere); their
    codes and scales are those of the planned bits, which packed kernels then store.

    Raises:
        ValueError: if torchao cannot hold the plan; the model is then as it was.
        RuntimeError: if a weight is not what was planned.
        ImportError: without torchao: ``pip install 'mpq-search[torchao]'``.
    """
    exported = to_torchao(plan)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.core.config import config_from_dict
            from torchao.quantization import quantize_
    except ImportError as error:
        raise ImportError("apply needs torchao: pip install 'mpq-search[torchao]'") from error
    if exported["_data"]["fqn_to_config"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize_(model, config_from_dict(exported), filter_fn=None)
    looked_at = [_wrong(model, entry, name) for entry in plan.entries for name in module_names(entry.layer)]
    if wrong := [told for told in looked_at if told is not None]:
        raise RuntimeError(f"torchao did not apply the plan: {'; '.join(wrong)}. Load the model again, it has changed")


def _wrong(model: nn.Module, entry: Entry, name: str) -> str | None:
    """What is wrong with the weight of one module after torchao; None if it is as planned."""
    option, weight = entry.choice, getattr(model.get_submodule(name), "weight", None)
    if not isinstance(option, Option) or weight is None:
        return f"{name!r} has no weight of one format"
    kind = type(weight).__name__
    codes = getattr(weight, "qdata", None)
    if is_unquantised(option):
        return None if codes is None else f"{name!r} was planned in {option} and is a {kind}"
    if codes is None:
        return f"{name!r} was planned in {option} and is still a {kind} of {weight.dtype}"
    if not _holds(weight, codes, option):
        return f"{name!r} was planned in {option} and is a {kind} of other bits, scales or inputs"
    return None


def _holds(weight: Any, codes: Tensor, option: Option) -> bool:
    """Whether codes, scales and inputs are those of the option."""
    fmt = weight_format(option)
    if not isinstance(fmt, Integer):
        return str(codes.dtype) == f"torch.{_FLOAT8.get(fmt.name)}"
    half = 2 ** (fmt.bits - 1)
    in_range = -half <= int(codes.min()) and int(codes.max()) < half
    granularity = fmt.granularity
    columns = granularity.size if granularity is not None and granularity.kind == "group" else weight.shape[-1]
    scales = weight.numel() // columns if weight.ndim == 2 else None
    has_scales = scales is None or weight.scale.numel() == scales
    takes_inputs = getattr(weight, "activation_quantization", None) or getattr(weight, "act_quant_kwargs", None)
    return in_range and has_scales and (takes_inputs is not None) == (option.activation is not None)
