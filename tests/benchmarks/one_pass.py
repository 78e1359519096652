"""What several gradient scores cost together, next to one plain forward and backward, and next to rounding alone.

    python tests/benchmarks/one_pass.py --model FOLDER              a causal language model in transformers' layout
    python tests/benchmarks/one_pass.py --layers 4                  a random Llama of that many layers

CPU seconds of all threads and the peak resident memory of each stage, which the kernel's high-water mark gives (Linux).
Everything is one process, so that the ratios are of one machine in one state; each stage is run `--repeats` times and
the least of each counts. The data is one batch of 8 sequences of 128 tokens, the options are integers of 2, 3, 4, 6
and 8 bits in groups of 64; the embedding is left as it is.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import mpq
from mpq.layers import Network
from mpq.options import SearchSpace
from mpq.quantizer import RoundToNearest
from mpq.sensitivity import estimate_together
from mpq.surgery import layer_parameters
from mpq.weight_view import as_rows

OPTIONS = [f"int{bits}@group64" for bits in (2, 3, 4, 6, 8)]
METHODS = ["fisher", "output_fisher", "first_order", "channel_salience"]


def resident() -> float:
    """Bytes in memory now."""
    return 1024 * _status("VmRSS")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1])


def measured(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Least CPU seconds of a few runs, and the largest peak of resident bytes."""
    seconds, peak = [], 0.0
    for _ in range(repeats):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
        peak = max(peak, 1024 * _status("VmHWM"))
    return min(seconds), peak


def model_and_batch(folder: str | None, layers: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A causal language model and 8 x 128 tokens; real ones are random tokens as well: only cost is measured."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if folder is not None:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, num_hidden_layers=layers, **sizes))
    model.config.use_cache = False
    ids = torch.randint(0, model.config.vocab_size, (8, 128))
    return model.eval(), {"input_ids": ids, "labels": ids.clone()}


def without_embedding(network: Network) -> Network:
    """The layers of the blocks."""
    kept = tuple(layer for layer in network.layers if ".layers." in layer.name)
    return Network(kept, batch=network.batch, total_bytes=network.total_bytes, fingerprint=network.fingerprint)


@click.command()
@click.option("--model", "folder", default=None)
@click.option("--layers", default=4)
@click.option("--granularity", default="layer")
@click.option("--repeats", default=2)
def main(folder: str | None, layers: int, granularity: str, repeats: int) -> None:
    """Print a row a stage: CPU seconds, ratio to forward + backward, peak memory."""
    model, batch = model_and_batch(folder, layers)
    network = without_embedding(mpq.trace(model, {"input_ids": batch["input_ids"][:1, :8]}))
    space = SearchSpace(OPTIONS, ties=None)
    print(f"{network}, {len(OPTIONS)} options, {granularity}, {torch.get_num_threads()} threads")

    def plain() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    def rounding() -> None:
        for layer in network.layers:
            rows = as_rows(layer_parameters(model, layer)[0].detach(), layer)
            for option in space.all_options:
                RoundToNearest()(rows, option.weight, layer)

    def scores(methods: list[str], labels: str | None) -> Callable[[], None]:
        settings = {method: {"labels": labels} for method in methods} if labels else {}
        given = {"granularity": granularity, "task": "causal-lm", "progress": False, "settings": settings}
        return lambda: estimate_together(model, batch, network, space, methods, **given)

    others = METHODS if granularity[:6] != "groups" else [method for method in METHODS if method != "output_fisher"]
    print(f"resident before: {resident() / 1e9:.2f} GB")
    base, base_peak = measured(plain, repeats)
    print(f"forward + backward: {base:.2f} s, {base_peak / 1e9:.2f} GB")
    rounded, _ = measured(rounding, repeats)
    print(f"rounding every option: {rounded:.2f} s = {rounded / base:.2f} of forward + backward")
    stages = {"together": (others, None), "together, labels='data'": (others, "data")}
    stages |= {f"{method} alone": ([method], None) for method in others}
    for name, (methods, labels) in stages.items():
        seconds, peak = measured(scores(methods, labels), repeats)
        ratio = (seconds - rounded) / base
        print(f"{name}: {seconds:.2f} s = rounding + {ratio:.2f} x; {peak / 1e9:.2f} GB = {peak / base_peak:.2f} x")


if __name__ == "__main__":
    main()
