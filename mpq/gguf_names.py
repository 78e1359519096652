"""GGUF's names of the tensors that transformers' decoders have: `model.layers.0.mlp.up_proj` is `blk.0.ffn_up`."""

from __future__ import annotations

import re
from typing import Any

from mpq.suggestions import did_you_mean

_TOP = {"embed_tokens": "token_embd", "lm_head": "output"}
_ROLES: dict[str, tuple[str, ...]] = {
    "self_attn.q_proj": ("attn_q",),
    "self_attn.k_proj": ("attn_k",),
    "self_attn.v_proj": ("attn_v",),
    "self_attn.o_proj": ("attn_output",),
    "self_attn.qkv_proj": ("attn_qkv",),
    "mlp.gate_proj": ("ffn_gate",),
    "mlp.up_proj": ("ffn_up",),
    "mlp.gate_up_proj": ("ffn_up",),
    "mlp.down_proj": ("ffn_down",),
    "mlp.gate": ("ffn_gate_inp",),
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.gate_proj": ("ffn_gate_exps",),
    "mlp.experts.up_proj": ("ffn_up_exps",),
    "mlp.experts.down_proj": ("ffn_down_exps",),
    "mlp.shared_expert.gate_proj": ("ffn_gate_shexp",),
    "mlp.shared_expert.up_proj": ("ffn_up_shexp",),
    "mlp.shared_expert.down_proj": ("ffn_down_shexp",),
}
_BLOCK = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.(.+)")
_OTHER_WORDS = (
    (re.compile(r"^(block_sparse_moe|feed_forward)\."), "mlp."),
    (re.compile(r"^mlp\.(router|gate\.wg)$"), "mlp.gate"),
    (re.compile(r"\.shared_experts\."), ".shared_expert."),
    (re.compile(r"\.experts\.\d+\."), ".experts."),
    (re.compile(r"(?<=experts\.)w1$"), "gate_proj"),
    (re.compile(r"(?<=experts\.)w2$"), "down_proj"),
    (re.compile(r"(?<=experts\.)w3$"), "up_proj"),
)
"""What other models and files call the roles; an expert that is stored alone is part of the tensor of all."""

_OUTSIDE = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?(embed_tokens|lm_head)")


def gguf_names(weight_name: str, *, architecture: str | None = None) -> tuple[str, ...]:
    """The tensors of a GGUF file that a parameter becomes, ``.weight`` included; two for stacked gate and up experts.

    Experts that are stored one by one become one tensor: `block_sparse_moe.experts.3.w1` is part of `ffn_gate_exps`.

    Without an architecture the names are those that Llama, Mistral, Mixtral, Qwen2, Qwen3, Gemma, SmolLM, Phi-3 and
    their kind share.

    Args:
        weight_name: the parameter's name in the transformers model.
        architecture: a name of the ``gguf`` package ("gpt2", "bert", "falcon"), whose table is then asked instead.

    Raises:
        ValueError: if the name is not known, or the architecture.
        ImportError: if an architecture is given and ``gguf`` is not installed.

    Example:
        >>> gguf_names("model.layers.3.self_attn.o_proj.weight")
        ('blk.3.attn_output.weight',)
    """
    stem = weight_name.removesuffix(".weight")
    if architecture is not None:
        return _by_package(weight_name, stem, architecture)
    if top := _OUTSIDE.fullmatch(stem):
        return (f"{_TOP[top[1]]}.weight",)
    block = _BLOCK.fullmatch(stem)
    if block and (role := _role(block[2])) in _ROLES:
        return tuple(f"blk.{block[1]}.{tensor}.weight" for tensor in _ROLES[role])
    hint = did_you_mean(block[2], _ROLES) if block else ""
    raise ValueError(
        f"no GGUF name is known for {weight_name!r}{hint}; name the architecture as the gguf package does, "
        "architecture='gpt2', to ask its table, or pin the layer to fp32 and leave it out"
    )


def _role(within_block: str) -> str:
    for other, ours in _OTHER_WORDS:
        within_block = other.sub(ours, within_block)
    return within_block


def parameter_of(tensor: str) -> tuple[str, ...]:
    """Endings of the parameter names that a GGUF tensor may come from, the other way round.

    Example:
        >>> parameter_of("blk.3.ffn_up.weight"), parameter_of("rope_freqs.weight")
        (('layers.3.mlp.up_proj', 'layers.3.mlp.gate_up_proj'), ())
    """
    stem = tensor.removesuffix(".weight")
    top = tuple(name for name, gguf in _TOP.items() if gguf == stem)
    if top:
        return top
    block = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
    if not block:
        return ()
    return tuple(f"layers.{block[1]}.{name}" for name, roles in _ROLES.items() if block[2] in roles)


def _by_package(weight_name: str, stem: str, architecture: str) -> tuple[str, ...]:
    import gguf

    by_name: dict[str, Any] = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in by_name:
        raise ValueError(f"architecture {architecture!r} is not known to gguf{did_you_mean(architecture, by_name)}")
    blocks = max([int(number) for number in re.findall(r"\.(\d+)\.", stem)], default=0) + 1
    found = gguf.get_tensor_name_map(by_name[architecture], blocks).get_name(stem)
    if found is None:
        raise ValueError(f"gguf has no name for {weight_name!r} in architecture {architecture!r}")
    return (f"{found}.weight",)
