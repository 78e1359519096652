"""CPU milliseconds of cost tables: 1000 layers x 16 options on every device, and large language models on five.

    python tests/benchmarks/pricing.py
    python tests/benchmarks/pricing.py --layers 1000 --target nvidia-h100 --profile
    python tests/benchmarks/pricing.py --models

CPU time of the process, best of --repeats: other work on the machine does not count, a cold cache does not either. The
aim is 50 ms for one device, with layers of four shapes as in a language model and with no two of one shape.
"""

from __future__ import annotations

import cProfile
import pstats
import resource
import time
from collections.abc import Callable

import click

import mpq.hardware_models as hardware
from mpq.layers import Layer, Network
from mpq.options import SearchSpace

OPTIONS = (
    "int2", "int3", "int4", "int4@group128", "int6", "int8", "int8@group64", "nf4", "mxfp4", "nvfp4", "fp8_e4m3",
    "int4/int4", "int4/int8", "int8/int8", "fp8_e4m3/fp8_e4m3", "fp16",
)  # fmt: skip
FIVE = ("nvidia-t4", "nvidia-a100", "nvidia-h100", "nvidia-rtx4090", "nvidia-b200")
SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
LLAMA_70B = {
    "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8,
}  # fmt: skip
MIXTRAL = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "experts_implementation": "grouped_mm",
}  # fmt: skip


def linears(count: int, distinct: bool) -> Network:
    """Linear layers on 128 positions, of four shapes or each of its own; every group of four is tied."""
    shapes = [(64 + i, 128 + i) if distinct else SHAPES[i % 4] for i in range(count)]
    layers = tuple(
        Layer(f"model.layers.{i}.proj", "linear", (out, inner), out * inner, out * inner * 128, (1, 128, inner),
              (1, 128, out), weight_bytes=2 * out * inner)
        for i, (out, inner) in enumerate(shapes)
    )  # fmt: skip
    siblings = tuple(tuple(layer.name for layer in layers[i : i + 4]) for i in range(0, count, 4))
    total = sum(layer.weight_bytes for layer in layers)
    return Network(layers, dtype="fp16", total_bytes=total, siblings=siblings)


def language_model(family: str, sizes: dict[str, object]) -> Network:
    """A model of the transformers library on the meta device, traced on 64 tokens: no weight is in memory."""
    import torch
    import transformers

    from mpq.tracing import trace

    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes))
    tokens = torch.zeros(1, 64, dtype=torch.long, device="meta")
    return trace(model.to(torch.bfloat16).eval(), {"input_ids": tokens})


def best_of(repeats: int, call: Callable[[], object]) -> float:
    """Least CPU milliseconds of a call."""
    taken = []
    for _ in range(repeats):
        before = time.process_time()
        call()
        taken.append(time.process_time() - before)
    return 1e3 * min(taken)


def synthetic(count: int, targets: tuple[str, ...], repeats: int) -> None:
    """One row a device."""
    space = SearchSpace(OPTIONS)
    click.echo(f"| device | {count} layers of 4 shapes | {count} layers of {count} shapes |\n|---|---:|---:|")
    for name in targets:
        target = hardware.load(name)
        taken = [
            best_of(repeats, lambda target=target, network=linears(count, distinct): target.costs(network, space))
            for distinct in (False, True)
        ]
        click.echo(f"| {name} | {taken[0]:.1f} ms | {taken[1]:.1f} ms |")


def models(repeats: int) -> None:
    """One row a language model: the tables of all five devices together."""
    space = SearchSpace(OPTIONS[:12])
    click.echo("| model | layers | options | devices | tables | resident |\n|---|---:|---:|---:|---:|---:|")
    for family, sizes in (("Llama", LLAMA_70B), ("Mixtral", MIXTRAL)):
        network = language_model(family, sizes)
        settings = {"phase": "decode", "context": 8192}
        taken = best_of(repeats, lambda n=network: [hardware.load(name).costs(n, space, **settings) for name in FIVE])
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # kibibytes on Linux
        counts = f"{len(network.layers)} | {len(space.all_options)} | {len(FIVE)}"
        click.echo(f"| {family} {network!r} | {counts} | {taken:.0f} ms | {resident:.2f} GB |")


@click.command()
@click.option("--layers", "count", default=1000)
@click.option("--target", "targets", multiple=True)
@click.option("--repeats", default=7)
@click.option("--profile", is_flag=True, help="Where the time of the first device goes.")
@click.option("--models", "with_models", is_flag=True, help="Llama-3-70B and Mixtral-8x7B on five devices instead.")
def main(count: int, targets: tuple[str, ...], repeats: int, profile: bool, with_models: bool) -> None:
    """Print a Markdown table."""
    if with_models:
        models(repeats)
        return
    names = targets or tuple(name for name in hardware.available() if hardware.load(name).kind in ("gpu", "cpu", "npu"))
    synthetic(count, names, repeats)
    if profile:
        network, space, target = linears(count, True), SearchSpace(OPTIONS), hardware.load(names[0])
        profiler = cProfile.Profile()
        profiler.runcall(target.costs, network, space)
        pstats.Stats(profiler).sort_stats("cumtime").print_stats(25)


if __name__ == "__main__":
    main()
