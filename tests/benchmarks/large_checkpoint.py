"""Plan a checkpoint of 8 billion weights that never fits in memory: peak resident memory, CPU seconds, wall seconds.

    python tests/benchmarks/large_checkpoint.py                      # 16 GB of shards in /tmp, deleted at the end
    python tests/benchmarks/large_checkpoint.py --layers 4 --folder /tmp/small --keep

Writes bf16 shards of Llama-3-8B's shapes (config.json of meta-llama/Meta-Llama-3-8B) whose values are slices of a pool
of normal numbers, each at an offset and a scale of its own. Then every command runs in a process of its own: `mpq
search` on the folder without data, `mpq export` of the plan, `mpq solve` of the table for another budget. The peak is
what the kernel says of that process (wait4: ru_maxrss, pages of files that are read are not in it). CPU seconds do not
depend on other work on the machine, wall seconds do.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from math import prod
from pathlib import Path

import click

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-05, "dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
POOL = 2**24
SHARD_BYTES = 19 * 10**8


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Llama-3-8B's tensors."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128256, 4096)}
    for i in range(layers):
        block = f"model.layers.{i}"
        found |= {f"{block}.self_attn.{x}_proj.weight": (4096, 4096) for x in "qo"}
        found |= {f"{block}.self_attn.{x}_proj.weight": (1024, 4096) for x in "kv"}
        found |= {f"{block}.mlp.{x}_proj.weight": (14336, 4096) for x in ("gate", "up")}
        found |= {f"{block}.mlp.down_proj.weight": (4096, 14336)}
        found |= {f"{block}.{x}_layernorm.weight": (4096,) for x in ("input", "post_attention")}
    return {**found, "model.norm.weight": (4096,), "lm_head.weight": (128256, 4096)}


def write_shards(folder: Path, layers: int, seed: int = 0) -> None:
    """Shards below 2 GB, their index and config.json; some MB of memory."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(POOL, generator=generator)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes(layers).items():
        if 2 * sum(map(prod, [*shards[-1].values(), shape])) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    weight_map: dict[str, str] = {}
    for index, tensors in enumerate(shards, 1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        ends = [0]
        for shape in tensors.values():
            ends.append(ends[-1] + 2 * prod(shape))
        places = pairwise(ends)
        header = {
            name: {"dtype": "BF16", "shape": shape, "data_offsets": place}
            for (name, shape), place in zip(tensors.items(), places, strict=True)
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            for shape in tensors.values():
                scale, left = 0.02 * float(2 ** torch.rand((), generator=generator)), prod(shape)
                while left:
                    start = int(torch.randint(POOL // 2, (), generator=generator))
                    part = (pool[start : start + min(left, POOL // 2)] * scale).bfloat16()
                    opened.write(part.view(torch.uint8).numpy().data)
                    left -= len(part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**LLAMA_3_8B, "num_hidden_layers": layers}))


def measured(command: list[str]) -> tuple[float, float, float]:
    """Run a command: peak resident bytes, CPU seconds, wall seconds."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime, time.perf_counter() - start


@click.command()
@click.option("--folder", type=Path, default=Path("/tmp/mpq-large-checkpoint"), show_default=True)
@click.option("--layers", default=32, show_default=True)
@click.option("--options", default="int3@group64,int4@group64,int8@group64", show_default=True)
@click.option("--budget", default="size=5.2 bits", show_default=True)
@click.option("--target", default="gptqmodel", show_default=True, help="Library that the plan is exported to.")
@click.option("--keep", is_flag=True, help="Leave the shards.")
@click.option("--write-only", is_flag=True, hidden=True)
def main(folder: Path, layers: int, options: str, budget: str, target: str, keep: bool, write_only: bool) -> None:
    """Write shards, plan, export, and say what that took."""
    folder.mkdir(parents=True, exist_ok=True)
    if write_only:
        write_shards(folder, layers)
        return
    mpq = [sys.executable, "-m", "mpq"]
    plan, table = str(folder / "plan.json"), str(folder / "table.parquet")
    pin = ["--pin", "model.embed_tokens=bf16"]  # GPTQModel and compressed-tensors take no embeddings
    search = ["search", str(folder), "--options", options, "--budget", budget, *pin, "--output", plan]
    commands = {
        "write": [sys.executable, __file__, "--write-only", "--folder", str(folder), "--layers", str(layers)],
        "search": [*mpq, *search, "--table", table],
        "export": [*mpq, "export", plan, target, "--output", str(folder / "export.json")],
        "solve": [*mpq, "solve", table, "--budget", "size=90%", "--csv"],
    }
    if (folder / "config.json").exists():
        del commands["write"]
    try:
        rows = {name: measured(command) for name, command in commands.items()}
    finally:
        if not keep:
            shutil.rmtree(folder)
    weights = sum(map(prod, shapes(layers).values()))
    click.echo(f"{weights:,} weights in bf16, options {options}")
    for name, (peak, cpu, wall) in rows.items():
        click.echo(f"{name:7} peak {peak / 1e6:6.0f} MB   CPU {cpu:7.1f} s   wall {wall:7.1f} s")


if __name__ == "__main__":
    main()
