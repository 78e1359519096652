"""CPU seconds of a measured method with and without leaving out what comes before the changed layer.

    python tests/benchmarks/prefix_reuse.py

One Markdown row a model: the same scores, made by full runs (`keep_bytes=0`) and by runs from the changed layer on.
CPU time of both within one process, so that a busy machine does not matter much.
"""

from __future__ import annotations

import time

import click
import torch
from torch import nn

import mpq
from mpq.batches import model_inputs
from mpq.options import SearchSpace


def deep_cnn(blocks: int = 16, width: int = 32) -> tuple[nn.Module, torch.Tensor]:
    """Convolutions in a row."""
    parts: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for _ in range(blocks):
        parts += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(*parts, *head).eval(), torch.randn(16, 3, 24, 24)


def transformer(blocks: int = 8, width: int = 128) -> tuple[nn.Module, torch.Tensor]:
    """Encoder blocks in a row."""
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
    encoder = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Linear(width, 10)).eval(), torch.randn(16, 64, width)


def llama(blocks: int = 6, width: int = 128) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small Llama of the transformers library, with its cache of keys and values in use."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=500,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(0, 500, (8, 128))}


@click.command()
@click.option("--options", default="int2,int3,int4,int8")
@click.option("--batches", default=2)
@click.option("--method", default="kl")
def main(options: str, batches: int, method: str) -> None:
    """Print a row a model."""
    click.echo("| model | layers | full runs, CPU s | reused, CPU s | times faster | largest difference |")
    click.echo("|---|---|---|---|---|---|")
    space = SearchSpace(options.split(","), ties=None)
    for build in (deep_cnn, transformer, llama):
        torch.manual_seed(0)
        model, batch = build()
        data = [batch] * batches
        network = mpq.trace(model, model_inputs(model, batch))
        seconds, frames = [], []
        mpq.sensitivity.estimate(model, data[:1], network, SearchSpace(["int8"]), method, progress=False)  # warm up
        for keep_bytes in (0, 2**31):
            before = time.process_time()
            frames.append(
                mpq.sensitivity.estimate(model, data, network, space, method, keep_bytes=keep_bytes, progress=False)
            )
            seconds.append(time.process_time() - before)
        full, reused = (frame["sensitivity"] for frame in frames)
        click.echo(
            f"| {build.__name__} | {len(network.layers)} | {seconds[0]:.1f} | {seconds[1]:.1f} "
            f"| {seconds[0] / seconds[1]:.2f} | {(full - reused).abs().max():.1g} |"
        )


if __name__ == "__main__":
    main()
