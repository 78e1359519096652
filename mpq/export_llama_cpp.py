"""A plan as `--tensor-type` of llama.cpp's `llama-quantize`, with the tensors' names in GGUF files."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from mpq.exported_layers import is_unquantised, taken_layers
from mpq.formats import GGUF, GGUF_BLOCKS
from mpq.gguf_names import gguf_names
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import Plan, weight_format

GGML_NAMES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "mxfp4": "mxfp4"}
"""The formats that GGUF files hold besides the GGUF types, by ggml's name."""

_HAS = f"llama.cpp has {', '.join(GGUF_BLOCKS)}, mxfp4, bf16, fp16 and fp32"
_FALLBACK = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl"}
_FALLBACK |= {"tq1_0": "q4_0", "tq2_0": "q4_0"}
_MXFP4_BLOCK = 32
_BASE = "Q8_0"
_ROUTER = r"\.(mlp|block_sparse_moe|feed_forward)\.(gate|router|gate\.wg|shared_expert_gate)(\.weight)?$"


def to_llama_cpp(plan: Plan, *, architecture: str | None = None) -> dict[str, Any]:
    """The plan for `llama-quantize`, by tensor name of the GGUF file.

    ``tensor_types`` maps an anchored regular expression a tensor to its type; `tensor_type_file` writes them as the
    file that ``--tensor-type-file`` reads. ``base`` is the type that the command wants as its last argument. It is what
    matrices outside the plan take, and must itself be a quantised type: with F16 or F32 there llama.cpp takes no
    notice of the list. Apply it to a file of floats:

        convert_hf_to_gguf.py FOLDER --outtype f32 --outfile model.gguf
        llama-quantize --tensor-type-file plan.txt model.gguf planned.gguf Q8_0

    llama.cpp stores another type where a row is not a multiple of the block (q4_k becomes q5_0), and passes over names
    it does not find, with a warning at most. The former is refused here. For the latter read the result back,
    `mpq.import_plan("planned.gguf", "llama.cpp", network)`, and compare it with the plan.

    Types of one scale a block come out as simulated; for the K types llama.cpp searches scales and errs less. Weights
    of tied embeddings are named twice, of which the file has one. Types below 3 bits with codebooks (iq1, iq2) need
    ``--imatrix`` as well. Checked with the llama.cpp that llama-cpp-python 0.3.36 carries.

    Args:
        plan: what is exported.
        architecture: a name of the ``gguf`` package, for models whose names are not those of Llama and its kind.

    Raises:
        ValueError: if a layer is split, experts of one tensor differ, a layer quantises its input, has a format that
            GGUF lacks or that does not divide its rows, or a name without counterpart.
    """
    types: dict[str, str] = {}
    first: dict[str, str] = {}
    for layer, option in taken_layers(plan, "llama.cpp", refused_by_llama_cpp):
        for tensor in tensors_of(layer, architecture):
            known = types.setdefault(f"^{re.escape(tensor)}$", ggml_name(option))
            if known != ggml_name(option):
                raise ValueError(
                    f"llama.cpp holds all experts of {tensor!r} in one type, the plan has {known} "
                    f"({first[tensor]!r}) and {ggml_name(option)} ({layer.name!r}): search with ties='auto'"
                )
            first.setdefault(tensor, layer.name)
    return {"base": _BASE, "tensor_types": types}


def tensors_of(layer: Layer, architecture: str | None = None) -> list[str]:
    """The tensors of a GGUF file that hold a layer's weight; a tied weight has two names, and only one may be known.

    Raises:
        ValueError: if none is known.
    """
    tensors = list(gguf_names(layer.weight_name, architecture=architecture))
    for alias in layer.aliases:
        with suppress(ValueError):
            tensors += gguf_names(alias, architecture=architecture)
    return tensors


def refused_by_llama_cpp(layer: Layer, option: Option) -> str | None:
    """Why llama.cpp cannot hold an option of a layer; None if it can."""
    weight = weight_format(option)
    if option.activation is not None:
        return f"it chooses the format of layer inputs itself: drop '/{option.activation}'"
    if layer.kind not in ("linear", "embedding", "experts"):
        return f"llama-quantize leaves a {layer.kind} as it is: pin it to fp32"
    if re.search(_ROUTER, layer.weight_name) and not is_unquantised(option):
        return "llama-quantize leaves the router of a mixture as it is: pin it to fp32"
    if weight.name not in GGML_NAMES and not isinstance(weight, GGUF):
        return _HAS
    if weight.name == "mxfp4" or isinstance(weight, GGUF):
        block = _MXFP4_BLOCK if weight.name == "mxfp4" else GGUF_BLOCKS[weight.name][0]
        columns = layer.weight_shape[-1]
        if columns % block:
            instead = _FALLBACK.get(weight.name)
            stored = f"llama.cpp would store {instead} instead" if instead else "llama.cpp would store fp16"
            return f"blocks of {block} do not divide its {columns} inputs, and {stored}: give it what divides them"
    return None


def ggml_name(option: Option) -> str:
    """The name that ggml has for a weight format.

    Example:
        >>> ggml_name(Option("q4_k")), ggml_name(Option("fp16"))
        ('q4_k', 'f16')
    """
    name = weight_format(option).name
    return GGML_NAMES.get(name, name)


def tensor_type_file(exported: dict[str, Any]) -> str:
    r"""The text for ``--tensor-type-file``: a line a tensor.

    Example:
        >>> tensor_type_file({"tensor_types": {"^output[.]weight$": "q6_k"}})
        '^output[.]weight$=q6_k\n'
    """
    return "".join(f"{pattern}={name}\n" for pattern, name in exported["tensor_types"].items())
