"""The network of a transformers checkpoint, traced on the meta device: its graph without one of its weights."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mpq.checkpoint_names import usual_dtype
from mpq.layers import Layer, Network
from mpq.stored_weights import FLOATS, Block, StoredTensor, StoredWeight, stored_weight

TOKENS = 128
"""Positions of the example inputs on the meta device, which multiply-adds and latency are for."""

_COMPARED = 2**20  # values of tied embeddings that are compared at a time


class NoGraphError(Exception):
    """Why a folder's graph is not known; its names and shapes still are."""


@dataclass(frozen=True)
class Graph:
    """A network traced on the meta device, where its weights are stored, and what is to be said of that."""

    network: Network
    weights: tuple[StoredWeight, ...]
    notes: tuple[str, ...] = ()


def graph_of_folder(folder: Path, tensors: Mapping[str, StoredTensor]) -> Graph:
    """The network of a folder with a config.json that transformers knows, as `AutoModelForCausalLM` would load it.

    Names of stored tensors become those of the model as transformers converts them on loading: experts that are stored
    one by one are rows of one 3-D parameter, gate above up. Embeddings that the config ties are one layer with an
    alias, in the file under either name; where both are stored and differ, transformers does not tie them, nor does
    this. Multiply-adds are those of `TOKENS` positions.

    Args:
        folder: has config.json.
        tensors: of its files.

    Raises:
        NoGraphError: if there is no config, transformers is not installed or does not know the model, the model cannot
            be traced without values, the checkpoint is quantised already, or transformers converts a stored tensor in
            a way that cannot be read in parts.
        ValueError: if the files lack a weight of the model, or store it in another shape.
    """
    with _quiet():
        config = _config(folder)
        model = _meta_model(config)
        stored = _Names(model, tensors)
        notes = []
        for first, second in stored.tied_twice:
            same = _equal(tensors[first], tensors[second])
            how = "hold the same: counted once" if same else "differ: they are two layers, as transformers loads them"
            notes.append(f"config.json ties {first!r} and {second!r}, both are stored and {how}")
            if not same:
                _untie(config)
        if any("differ" in note for note in notes):
            model = _meta_model(config)
            stored = _Names(model, tensors)
        network = _traced(model)
    return _graph(network, stored, tuple(notes))


@dataclass(frozen=True)
class _Part:
    """A stored tensor that is a part of a parameter: the pattern of transformers' converter that it matched."""

    tensor: StoredTensor
    pattern: str | None


@dataclass
class _Names:
    """Which stored tensors each parameter or buffer of a model is made of."""

    model: Any
    tensors: Mapping[str, StoredTensor]
    parts: dict[str, list[_Part]] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    converters: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        state = self.model.state_dict()
        renamed = self._renaming(state)
        for name, tensor in self.tensors.items():
            mine, pattern = renamed(name)
            if mine in state:
                self.parts.setdefault(mine, []).append(_Part(tensor, pattern))
            else:
                self.unknown[name] = "the model has no parameter for it"

    def _renaming(self, state: Mapping[str, Any]) -> Any:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, rename_source_key
        except ImportError:  # before transformers 5 nothing is converted
            return lambda name: (name, None)
        found = get_model_conversion_mapping(self.model)
        self.converters = [each for each in found if isinstance(each, WeightConverter)]
        renamings: list[Any] = [each for each in found if not isinstance(each, WeightConverter)]
        prefix = self.model.base_model_prefix
        return lambda name: rename_source_key(name, renamings, self.converters, prefix, dict(state))

    @property
    def tied_twice(self) -> list[tuple[str, str]]:
        """Stored tensors that are one parameter by the config."""
        ties = getattr(self.model, "all_tied_weights_keys", None) or {}
        pairs = [(self.parts.get(source), self.parts.get(target)) for target, source in ties.items()]
        return [(a[0].tensor.name, b[0].tensor.name) for a, b in pairs if a and b]

    def of(self, layer: Layer) -> tuple[str, list[_Part]]:
        """The name under which a layer's weight is stored, and of what it is made.

        Raises:
            ValueError: if it is not in the files.
        """
        for name in (layer.weight_name, *layer.aliases):
            if name in self.parts:
                return name, self.parts[name]
        raise ValueError(
            f"the checkpoint must hold {layer.weight_name!r}, its files have no such tensor"
            + (f" (they have {next(iter(self.unknown))!r}, which the model lacks)" if self.unknown else "")
            + ": complete it, or set tie_word_embeddings in config.json where an output layer is tied"
        )

    def weight(self, layer: Layer) -> StoredWeight:
        """Where the rows of a layer's weight are."""
        _, parts = self.of(layer)
        if parts[0].pattern is None:
            return stored_weight(layer, parts[0].tensor)
        converter = next(each for each in self.converters if parts[0].pattern in each.source_patterns)
        operations = [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]
        merged = operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
        if not (merged and layer.kind == "experts" and layer.channel_axis == 1) and operations != [("Concatenate", 0)]:
            told = ", ".join(name for name, _ in operations)
            raise NoGraphError(f"transformers makes {layer.name!r} of stored tensors by {told}")
        columns = [
            sorted((part.tensor for part in parts if part.pattern == pattern), key=_natural)
            for pattern in converter.source_patterns
        ]
        if len({len(column) for column in columns}) > 1 or (merged and len(columns[0]) != layer.experts):
            counts = " and ".join(str(len(column)) for column in columns)
            raise ValueError(f"{layer.name!r} must be stored as {layer.experts} experts, the files have {counts}")
        rows = [tensor for each in zip_longest(*columns) for tensor in each]
        weight = StoredWeight(layer, tuple(Block(tensor, 0, tensor.shape) for tensor in rows))
        height = sum(tensor.shape[0] for tensor in rows)
        if (height, *rows[0].shape[1:]) != layer.weight_shape or len({tensor.shape[1:] for tensor in rows}) > 1:
            raise ValueError(
                f"the parts of {layer.name!r} must make {layer.weight_shape}, {rows[0].name!r} does not fit"
            )
        return weight


def _graph(network: Network, stored: _Names, notes: tuple[str, ...]) -> Graph:
    """The network with the bytes that the files hold, and its weights in them."""
    layers, weights, used = [], [], set()
    for layer in network.layers:
        name, parts = stored.of(layer)
        used |= {name, layer.weight_name, *layer.aliases}
        unread = next((part.tensor for part in parts if part.tensor.dtype not in FLOATS), None)
        if unread is not None:
            raise NoGraphError(f"{unread.name!r} is stored as {unread.dtype}: the checkpoint is quantised already")
        layers.append(replace(layer, weight_bytes=sum(part.tensor.stored_bytes for part in parts)))
        weights.append(stored.weight(layers[-1]))
    planned = sum(layer.weight_bytes for layer in layers)
    outside = sum(p.tensor.stored_bytes for name, parts in stored.parts.items() if name not in used for p in parts)
    network = replace(
        network,
        layers=tuple(layers),
        total_bytes=planned + outside,
        outside_bytes=outside,
        dtype=usual_dtype(block.tensor for weight in weights for block in weight.blocks),
        skipped={**network.skipped, **stored.unknown},
    )
    return Graph(network, tuple(weights), notes)


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise NoGraphError("there is no config.json")
    try:
        import transformers
    except ImportError as error:
        raise NoGraphError("transformers is not installed: pip install 'mpq-search[transformers]'") from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # what a broken or unknown config leads to, of any kind
        raise NoGraphError(f"transformers does not know it ({_short(error)})") from error
    given = getattr(config, "quantization_config", None)
    if given is not None:
        raise NoGraphError("config.json says that the checkpoint is quantised already")
    return config


def _meta_model(config: Any) -> Any:
    """The model without values; experts as grouped products, since the meta device cannot look where tokens go."""
    import torch
    import transformers

    loader = transformers.AutoModelForCausalLM if is_causal(config) else transformers.AutoModel
    failure: Exception | None = None
    for how in ({"experts_implementation": "grouped_mm"}, {}):
        try:
            with torch.device("meta"):
                model = loader.from_config(deepcopy(config), **how)  # type: ignore[no-untyped-call]
                return model.eval()
        except Exception as error:  # what a model's code does where it has no values, of any kind
            failure = error
    raise NoGraphError(f"transformers cannot build it without values ({_short(failure)})") from failure


def is_causal(config: Any) -> bool:
    """Whether a folder holds a language model that predicts the next token, head included.

    Example:
        >>> from types import SimpleNamespace
        >>> [is_causal(SimpleNamespace(architectures=[name])) for name in ("GPT2LMHeadModel", "ViTModel")]
        [True, False]
    """
    return any("CausalLM" in name or "LMHeadModel" in name for name in config.architectures or ())


def _traced(model: Any) -> Network:
    from mpq.tracing import trace

    try:
        return trace(model, _example_inputs(model))
    except Exception as error:  # the same
        raise NoGraphError(f"the model cannot be traced without values ({_short(error)})") from error


def _example_inputs(model: Any) -> dict[str, Any]:
    import torch

    config = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        shape = (1, getattr(config, "num_channels", 3), *(size if isinstance(size, list | tuple) else (size, size)))
        return {"pixel_values": torch.zeros(shape, device="meta")}
    tokens = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids}
    if hasattr(config, "use_cache"):  # without one transformers looks into the positions for packed sequences
        inputs["use_cache"] = True
    return inputs | ({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {})


def _untie(config: Any) -> None:
    for each in (config, getattr(config, "text_config", None)):
        if each is not None:
            each.tie_word_embeddings = False


def _equal(first: StoredTensor, second: StoredTensor) -> bool:
    import torch

    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    blocks = (Block(tensor, 0, tensor.shape).chunks(_COMPARED) for tensor in (first, second))
    return all(torch.equal(a, b) for a, b in zip(*blocks, strict=True))


def _natural(tensor: StoredTensor) -> list[tuple[int, int | str]]:
    parts = re.split(r"(\d+)", tensor.name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def _short(error: Exception | None) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" + ("…" if len(text) > 160 else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says of models that nobody will run."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
