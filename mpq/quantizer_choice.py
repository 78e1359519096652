"""Which quantiser a name stands for: rounding to nearest, GPTQ from calibration data, or a folder of weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq.suggestions import did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from mpq.quantizer import Quantizer

NEAREST, GPTQ_NAME = "nearest", "gptq"
QUANTIZERS = (NEAREST, GPTQ_NAME)


def choose_quantizer(name: str | Path, model: nn.Module, data: Any) -> Quantizer | None:
    """The quantiser that a name stands for, None for rounding to nearest, which is every function's default.

    Args:
        name: "nearest"; "gptq": `mpq.gptq.GPTQ` by the inputs of the layers on the data, where GPTQ cannot quantise a
            layer or a format that is rounded to nearest; or a folder, which `mpq.weight_database.WeightDatabase` reads.
        model: in full precision; comes back bit for bit.
        data: calibration data, as for `mpq.search`.

    Cost: of "gptq" a pass over the data and in² numbers a layer (`mpq.gptq.input_hessians`).

    Raises:
        ValueError: if it is none of these, or the folder holds no weights.

    Example:
        >>> import torch
        >>> model, data = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.randn(8, 4)
        >>> choose_quantizer("gptq", model, data).hessians["0"].shape
        torch.Size([1, 4, 4])
        >>> choose_quantizer("nearest", model, data) is None
        True
    """
    if name == NEAREST:
        return None
    if name == GPTQ_NAME:
        from mpq.batches import batches_of, model_inputs
        from mpq.gptq import GPTQ, input_hessians
        from mpq.quantizer import RoundToNearest
        from mpq.tracing import trace

        batches = batches_of(data)
        layers = trace(model, model_inputs(model, batches[0])).layers
        return GPTQ(hessians=input_hessians(model, batches, layers), otherwise=RoundToNearest())
    if Path(name).is_dir():
        from mpq.weight_database import WeightDatabase

        return WeightDatabase(name)
    hint = did_you_mean(str(name), QUANTIZERS)
    raise ValueError(
        f"quantizer must be {', '.join(QUANTIZERS)} or a folder with .safetensors files of quantised weights, "
        f"got {str(name)!r}{hint}"
    )
