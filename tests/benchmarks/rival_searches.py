"""One tool's own search for the width of every layer, in the interpreter that has the tool.

    PYTHON rival_searches.py mpq|model-optimizer|auto-round JOB.json ANSWER.json

`rivals.py` runs this file once a tool: each process is its own measure of time and memory, and imports nothing of the
others. JOB: `model` ("FILE.py:function", which returns a model and a list of batches), `widths`, `group` (weights a
scale; 0 is a scale a channel), `bits` (the budgets: bits of the values of `layers`, {name: weights}), `method` and for
mpq `pins`, `task` and `table`, the file to write. ANSWER: `plans` ({budget: {layer: width}}), `refused` ({budget: the
tool's own words}), `version`, of Model Optimizer `tied` (layers that it gives one width), of mpq `layers`.

All quantise weights only, symmetrically. Model Optimizer scores all batches, one step a batch, in one search, and
solves its scores again for every budget. Its budget counts layers that are not searched at 16 bits; ours is converted.
AutoScheme takes text and a tokenizer: here the text is the tokens' numbers and the tokenizer reads numbers, so that it
sees the same sequences. It scores one sequence at a time, its default where the whole model is differentiated, and
keeps its scores in files, in the folder that AR_AUTO_SCHEME_CACHE names.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Answer = dict[str, Any]


def loaded(name: str) -> tuple[nn.Module, list[Any]]:
    """What "FILE.py:function" returns first: a model and batches."""
    file, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"model must be FILE.py:function, got {name!r}")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(file).parent.resolve()))
    spec.loader.exec_module(module)
    model, batches, *_ = getattr(module, function)()
    return model, batches


def each_budget(job: Mapping[str, Any], solve: Callable[[float], dict[str, int]]) -> Answer:
    """A plan a budget, or why there is none."""
    plans, refused = {}, {}
    for bits in job["bits"]:
        try:
            found = solve(bits)
        except Exception as error:  # whatever a tool raises is its answer
            refused[f"{bits:g}"] = f"{type(error).__name__}: {error}"
        else:
            plans[f"{bits:g}"] = {name: int(found[name]) for name in job["layers"]}
    return {"plans": plans, "refused": refused}


def search_with_mpq(job: dict[str, Any], model: nn.Module, batches: list[Any]) -> Answer:
    """A table and its plans, layers untied."""
    import numpy as np

    import mpq
    from mpq.planning import choices_of

    options = [f"int{width}@group{job['group']}" if job["group"] else f"int{width}" for width in job["widths"]]
    space = mpq.SearchSpace(options, job["pins"], ties=None)
    how = {"sensitivity": job["method"], "task": job["task"], "method_settings": job["settings"]}
    table = mpq.measure(model, batches, space, progress=False, **how)
    table.save(job["table"])
    free = (table.allowed.sum(axis=1) > 1).nonzero()[0].tolist()
    job["layers"] = {str(table.units[unit]): int(table.parameters[unit]) for unit in free}
    size = table.quantity("value_size")
    pinned = float(np.nanmin(np.delete(size, free, axis=0), axis=1).sum())

    def solve(bits: float) -> dict[str, int]:
        plan = table.solve({"value_size": bits * sum(job["layers"].values()) / 8 + pinned})
        codes = choices_of(table, plan)
        return {str(table.units[unit]): job["widths"][codes[unit]] for unit in free}

    return each_budget(job, solve) | {"layers": job["layers"], "version": version("mpq-search")}


def search_with_model_optimizer(job: dict[str, Any], model: nn.Module, batches: list[Any]) -> Answer:
    """`auto_quantize` by `method`, "gradient" or "kl_div"."""
    optimizer = import_module("modelopt.torch.quantization")
    solve_again = import_module("modelopt.torch.quantization.algorithms").get_auto_quantize_config
    linear = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    others = {name: m for name, m in model.named_modules() if isinstance(m, linear) and name not in job["layers"]}
    rest, planned = sum(m.weight.numel() for m in others.values()), sum(job["layers"].values())
    formats = [weights_only(width, job["group"]) for width in job["widths"]]

    def constraint(bits: float) -> dict[str, float]:
        return {"effective_bits": (planned * bits + rest * 16) / (planned + rest) - 1e-6}

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    _, state = optimizer.auto_quantize(
        model,
        constraints=constraint(max(job["bits"])),
        quantization_formats=formats,
        module_search_spaces=[
            {"module_name_patterns": ["*"], "quantization_formats": formats, "allow_no_quant": False}
        ],
        data_loader=batches,
        forward_step=logits,
        loss_func=loss,
        disabled_layers=list(others),
        num_calib_steps=1,  # the largest weight needs no data
        num_score_steps=len(batches),
        method=job["method"],
    )

    def solve(bits: float) -> dict[str, int]:
        chosen = solve_again(state, constraints=constraint(bits))["quant_cfg"]
        return {
            entry["quantizer_name"].removesuffix(".weight_quantizer"): entry["cfg"]["num_bits"]
            for entry in chosen
            if entry["quantizer_name"].endswith(".weight_quantizer") and entry.get("cfg")
        }

    groups = [list(found["module_names"]) for found in state["candidate_stats"].values()]
    tied = [names for names in groups if len(names) > 1 and set(names) <= set(job["layers"])]
    return each_budget(job, solve) | {"tied": tied, "version": version("nvidia-modelopt")}


def weights_only(width: int, group: int) -> dict[str, Any]:
    """Model Optimizer's integer format: a scale a block of the last axis, or a channel."""
    scales: dict[str, Any] = {"block_sizes": {-1: group}} if group else {"axis": 0}
    weight = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": width, **scales}}
    return {"quant_cfg": [weight, {"quantizer_name": "*input_quantizer", "enable": False}], "algorithm": "max"}


def logits(model: nn.Module, batch: Any) -> torch.Tensor:
    """The output of a language model on a mapping, of a classifier on (inputs, labels)."""
    output: torch.Tensor = model(**batch).logits if isinstance(batch, Mapping) else model(batch[0])
    return output


def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
    """Cross-entropy with the data's labels: of the next token, or of the class."""
    if not isinstance(batch, Mapping):
        return functional.cross_entropy(output, batch[1])
    return functional.cross_entropy(output[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


class Numbers:
    """A tokenizer for sequences that are tokens already: "17 4 250" is three tokens."""

    bos_token_id = eos_token_id = None

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        ids = [[int(word) for word in text.split()] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


def search_with_auto_round(job: dict[str, Any], model: nn.Module, batches: list[Any]) -> Answer:
    """AutoRound's AutoScheme; what it says of a model without tokens is kept as it is."""
    schemes = import_module("auto_round.auto_scheme.gen_auto_scheme")
    option = import_module("auto_round.schemes").QuantizationScheme
    group = job["group"] or -1
    kind = {"group_size": group, "sym": True, "data_type": "int", "act_bits": 16}
    tokens = [batch["input_ids"] for batch in batches if isinstance(batch, Mapping)]
    rows = torch.cat(tokens).tolist() if tokens else []
    text = Path(job["folder"]).resolve() / "tokens.json"
    text.write_text(json.dumps([" ".join(map(str, row)) for row in rows]))
    samples = {"nsamples": len(rows), "seqlen": max(map(len, rows), default=0)}

    def solve(bits: float) -> dict[str, int]:
        scheme = schemes.AutoScheme(
            avg_bits=bits,
            options=[option(bits=width, **kind) for width in job["widths"]],
            ignore_scale_zp_bits=True,
            device_map="cpu",
            low_gpu_mem_usage=False,
            low_cpu_mem_usage=False,
            enable_torch_compile=False,
            **samples,
        )
        how = {"dataset": str(text), "device_map": "cpu", "enable_torch_compile": False}
        search = schemes.GenScheme(scheme, model, list(job["layers"]), {}, tokenizer=Numbers() if rows else None, **how)
        return {name: found["bits"] for name, found in search.get_layer_config().items()}

    return each_budget(job, solve) | {"version": version("auto-round")}


TOOLS = {
    "mpq": search_with_mpq,
    "model-optimizer": search_with_model_optimizer,
    "auto-round": search_with_auto_round,
}

if __name__ == "__main__":
    _, tool, given, result = sys.argv
    description = json.loads(Path(given).read_text())
    Path(result).write_text(json.dumps(TOOLS[tool](description, *loaded(description["model"]))))
