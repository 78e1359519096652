"""A checkpoint larger than memory: its network, and where the weight of every layer lies in its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpq.checkpoint_graph import NoGraphError, graph_of_folder
from mpq.checkpoint_names import network_of_names
from mpq.layers import Network
from mpq.stored_weights import StoredWeight, stored_tensors, stored_weight


@dataclass(frozen=True)
class Checkpoint:
    """The layers of safetensors files.

    Attributes:
        network: traced on the meta device where the folder's config.json and transformers allow, else by names.
        weights: where the weight of each layer is stored, by the layer's name.
        graph: whether the network has multiply-adds and edges, as a traced one.
        notes: what is worth saying: why there is no graph, embeddings that are stored twice.
    """

    network: Network
    weights: dict[str, StoredWeight]
    graph: bool
    notes: tuple[str, ...] = ()


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is a .safetensors file or a folder with some."""
    path = Path(path)
    return path.suffix == ".safetensors" if path.is_file() else any(path.glob("*.safetensors"))


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Find the layers of a checkpoint without reading its weights.

    Args:
        path: a .safetensors file, or a folder with one, with several, or with shards and their index.

    Raises:
        ValueError: if files are missing or broken, there is nothing to plan, or config.json is for another model.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"up.weight": torch.ones(4, 8), "up.bias": torch.ones(4)}, f"{folder}/model.safetensors")
        ...     found = read_checkpoint(folder)
        >>> found.network["up"].weight_shape, found.network.outside_bytes, found.notes[0]
        ((4, 8), 16, 'layers are known by names and shapes alone: there is no config.json')
    """
    path = Path(path)
    tensors = stored_tensors(path)
    try:
        graph = graph_of_folder(path if path.is_dir() else path.parent, tensors)
    except NoGraphError as error:
        network = network_of_names(tensors)
        weights = [stored_weight(layer, tensors[layer.weight_name]) for layer in network.layers]
        notes = (f"layers are known by names and shapes alone: {error}",)
        found = Checkpoint(network, {weight.layer.name: weight for weight in weights}, False, notes)
    else:
        found = Checkpoint(graph.network, {weight.layer.name: weight for weight in graph.weights}, True, graph.notes)
    if not found.network.layers:
        raise ValueError(f"a checkpoint must have a tensor to plan, {str(path)!r} has none of two axes in floats")
    return found
