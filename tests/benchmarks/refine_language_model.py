"""Measured refinement of a language model: layers, rows or groups, plain or compensated rounding, on held-out text.

    python tests/benchmarks/refine_language_model.py lm.py:load --selection lm.py:selection --holdout lm.py:heldout \
        --pin model.embed_tokens=fp32 --bits 3,3.5,4,4.5 --granularity groups:64 --folder out

`load` returns the model and the sequences that the table is made on; `--selection` and `--holdout` (one column each)
are functions that return other sequences. Layers that a pin names are left out of the bits. The table, what was
measured and the refined plans stay in `--folder`: a run that was killed goes on. One Markdown row a budget, method and
seed: held-out divergence ± its standard error, and of refined plans the paired difference from the table's plan,
evaluations of the whole selection data, plans, CPU seconds.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np

import mpq
from mpq.batches import batches_of, model_inputs
from mpq.evaluator import Evaluator
from mpq.gptq import GPTQ, input_hessians
from mpq.kept_weights import KeptWeights
from mpq.model_source import call_function, load_source
from mpq.options import matching
from mpq.planning import choices_of
from mpq.quantizer import RoundToNearest
from mpq.refinement import refine
from mpq.score_blocks import sorted_blocks

BITS = "int2@group64,int3@group64,int4@group64,int6@group64,int8@group64"
KEPT_BYTES = 5 * 2**29  # of reference outputs, and as many of quantised weights; judges keep a fifth


def table_of(source, given, pins, quantizer):
    """The table, read where it was made before."""
    file = Path(given["folder"]) / f"{given['granularity'].replace(':', '')}-{given['name']}.parquet"
    if not file.exists():
        started = time.process_time()
        space = mpq.SearchSpace(given["options"].split(","), pins, None)
        settings = {"sensitivity": given["sensitivity"], "granularity": given["granularity"], "quantizer": quantizer}
        table = mpq.measure(source.model, source.data, space, task=source.task, progress=False, **settings)
        table.save(file)
        click.echo(f"table: {given['sensitivity']}, {time.process_time() - started:.1f} CPU s")
    return mpq.CostTable.load(file)


def compensating(source, pins):
    """GPTQ on the table's sequences; layers with a pin are left out."""
    inputs = model_inputs(source.model, batches_of(source.data)[0])
    layers = mpq.trace(source.model, inputs).layers
    fixed = {name for pattern in pins for name in matching(pattern, [layer.name for layer in layers], "pins")}
    free = [layer for layer in layers if layer.name not in fixed]
    return GPTQ(hessians=input_hessians(source.model, source.data, free), otherwise=RoundToNearest())


def budget_of(table, bits, pins):
    """Bytes of values that are so many bits a weight of the layers no pin names."""
    names = [layer.name for layer in table.layers]
    fixed = np.isin(names, [name for pattern in pins for name in matching(pattern, names, "pins")])[table.layer_index]
    least = np.nanmin(np.where(table.allowed, table.quantity("value_size"), np.nan), axis=1)
    return {"value_size": float(bits * table.parameters[~fixed].sum() / 8 + least[fixed].sum())}


def row(name, judges, plan, start, rest=""):
    """Held-out figures of a plan, and how it differs from another."""
    cells = []
    for judge in judges:
        found, first = judge.measure(plan), judge.measure(start)
        cells.append(f"{found.divergence:.4f} ± {found.standard_error:.4f}")
        difference = found.per_sample - first.per_sample
        error = difference.std(ddof=1) / len(difference) ** 0.5
        cells.append(f"{difference.mean():+.4f} ± {error:.4f}" if plan is not start else "")
    click.echo(f"| {name} | {' | '.join(cells)} | {rest} |")


@click.command()
@click.argument("model")
@click.option("--selection", required=True)
@click.option("--holdout", multiple=True, required=True)
@click.option("--options", default=BITS)
@click.option("--name", default="plain", help="Of the table's file: options and quantiser have one each.")
@click.option("--pin", "pins", multiple=True)
@click.option("--bits", default="3,3.5,4,4.5")
@click.option("--granularity", default="layer")
@click.option("--blocks", default=0, help="Units of a layer, sorted by score, that share a format.")
@click.option("--sensitivity", default="fisher")
@click.option("--quantizer", type=click.Choice(["nearest", "gptq"]), default="nearest")
@click.option("--seeds", default="0")
@click.option("--evaluations", default=20.0)
@click.option("--set", "settings", multiple=True, help="A field of the search: patience=3.")
@click.option("--folder", required=True)
def main(**given) -> None:
    """Refine MODEL at every budget and seed, and print a row a plan."""
    Path(given["folder"]).mkdir(parents=True, exist_ok=True)
    source = load_source(given["model"])
    pins = dict(pin.split("=") for pin in given["pins"])
    quantizer = compensating(source, pins) if given["quantizer"] == "gptq" else None
    table = table_of(source, given, pins, quantizer)
    table = sorted_blocks(table, given["blocks"]) if given["blocks"] else table
    how = {"task": source.task, "quantizer": quantizer}
    kept = {"kept_bytes": KEPT_BYTES // 5, "cache": given["folder"]}
    judges = [Evaluator(source.model, call_function(name), table, **kept, **how) for name in given["holdout"]]
    weights = KeptWeights(quantizer or RoundToNearest(), KEPT_BYTES)
    for judge in judges:
        judge.weights = weights
    settings = {
        name: float(text) if "." in text else int(text) for name, text in (s.split("=") for s in given["settings"])
    }
    selection = call_function(given["selection"])
    heads = " | ".join(f"{name.rpartition(':')[2]} | less the table's" for name in given["holdout"])
    click.echo(f"| bits, method | {heads} | selection | evaluations | plans | CPU s |")
    click.echo("|---" * (5 + 2 * len(judges)) + "|")
    for bits in given["bits"].split(","):
        budgets = budget_of(table, float(bits), pins)
        started = time.process_time()
        start = choices_of(table, table.solve(budgets))
        solving = time.process_time() - started
        row(f"{bits}, table", judges, start, start, f" | | | {solving:.1f}")
        for seed in map(int, given["seeds"].split(",") if given["seeds"] else ()):
            evaluator = Evaluator(
                source.model, selection, table, evaluations=given["evaluations"], seed=seed,
                cache=given["folder"], kept_bytes=KEPT_BYTES, **how,
            )  # fmt: skip
            evaluator.weights = weights
            started = time.process_time()
            found = refine(source.model, None, table, budgets, seed=seed, evaluator=evaluator, **settings)
            taken, plans = time.process_time() - started, len(evaluator.measured)
            units = given["granularity"].replace(":", "") + (f"-sorted{given['blocks']}" if given["blocks"] else "")
            stem = f"{units}-{given['name']}-{bits}-{seed}"
            found.plan.save(Path(given["folder"]) / f"{stem}.json")
            rest = f"{found.selection.start:.4f} → {found.selection.best:.4f} | {found.evaluations:.1f}"
            rest += f" | {plans} | {taken:.0f}"
            row(f"{bits}, refined, seed {seed}", judges, choices_of(table, found.plan), start, rest)
            del evaluator, found  # what they keep is some gigabytes


if __name__ == "__main__":
    main()
