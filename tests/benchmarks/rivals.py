"""Other tools' plans and ours in one run: same model, data, widths and budgets, every plan judged by one quantiser.

    python tests/benchmarks/rivals.py cnn net.py:load --holdout net.py:holdout \
        --modelopt MODELOPT/bin/python --autoround AUTOROUND/bin/python
    python tests/benchmarks/rivals.py language-model lm.py:load --holdout lm.py:first8 --holdout lm.py:next24 \
        --pin model.embed_tokens=fp32 --modelopt ... --autoround ... --plan refined.json

`load` returns the model and a list of batches, which every tool scores; `--holdout` (some columns each) are functions
that return other batches. `--modelopt` and `--autoround` are interpreters that have nvidia-modelopt and auto-round:
every search, ours as well, is a process of its own (`rival_searches.py`), whose CPU seconds and peak memory are of the
whole process with all budgets, imports included. Widths are 2, 3, 4, 6 and 8 bits, weights only: a scale a channel
for `cnn`, a group of 64 for `language-model`. Bits are those of the values alone, over the layers no pin names.

One Markdown row a budget and method: bits kept, layers of each width, held-out divergence ± its standard error, and the
paired difference from our plan at that budget ± its own; negative is better than ours. A plan that leaves more than 1 %
of the budget is compared with ours at its own bits. Model Optimizer gives one width to layers that runtimes fuse, so
"mpq, tied" solves our table with its groups, and another column is the difference from that. `--plan` is {layer: width}
as JSON, or a plan of ours for the same options. With `--folder` a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

import mpq
from mpq.evaluator import Evaluator
from mpq.model_source import call_function, load_source
from mpq.planning import choices_of

WIDTHS = (2, 3, 4, 6, 8)
KEPT_BYTES = 3 * 2**30
SEARCHES = Path(__file__).with_name("rival_searches.py")
SETTINGS: dict[str, dict[str, Any]] = {
    "cnn": {"group": 0, "bits": "3,4,5", "methods": ["gradient", "kl_div"], "ours": "kl", "settings": {}},
    "language-model": {
        "group": 64, "bits": "3,3.5,4,4.5", "methods": ["gradient"], "ours": "fisher", "settings": {"labels": "model"},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Search:
    """What one process found: plans and refusals by budget, CPU seconds, peak resident bytes."""

    name: str
    plans: dict[str, dict[str, int]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    peak: float = 0.0
    answer: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def run(cls, name: str, tool: str, python: str, job: dict[str, Any]) -> Search:
        """Run a search, or read what it found when it was run before; what it prints goes to a file in its folder."""
        stem = Path(job["folder"]) / name.replace(" ", "-").replace(",", "")
        given, result, log, done = (stem.with_suffix(end) for end in (".job.json", ".json", ".log", ".done.json"))
        described = json.dumps(job)
        if done.exists() and given.read_text() == described:
            return cls(**json.loads(done.read_text()))
        given.write_text(described)
        for old in (result, done):
            old.unlink(missing_ok=True)
        caches = {"AR_AUTO_SCHEME_CACHE": tempfile.mkdtemp(dir=job["folder"])}  # scores of earlier runs cost nothing
        with log.open("w") as printed:
            process = subprocess.Popen(
                [python, "-P", str(SEARCHES), tool, str(given), str(result)],
                stdout=printed, stderr=subprocess.STDOUT, env=os.environ | caches, cwd=job["folder"],
            )  # fmt: skip
            _, status, usage = os.wait4(process.pid, 0)
        seconds, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024.0
        if status:
            reason = (log.read_text().strip().splitlines() or ["no output"])[-1]
            return cls(name, {}, {f"{bits:g}": reason for bits in job["bits"]}, seconds, peak)
        answer = json.loads(result.read_text())
        found = cls(name, answer["plans"], answer["refused"], seconds, peak, answer)
        done.write_text(json.dumps(asdict(found)))
        return found


@dataclass(frozen=True)
class Judge:
    """Plans of a table, measured on held-out data: option indices in, cells of a row out."""

    table: Any
    free: np.ndarray
    evaluators: tuple[Evaluator, ...]
    group: int

    def codes(self, plan: dict[str, int]) -> np.ndarray:
        """{layer: width} as option indices; the other layers have one option."""
        codes: np.ndarray = self.table.allowed.argmax(axis=1)
        for unit in self.free:
            width = plan[str(self.table.units[unit])]
            codes[unit] = self.table.options.index(f"int{width}@group{self.group}" if self.group else f"int{width}")
        return codes

    def size(self, codes: np.ndarray) -> tuple[float, str]:
        """Bits a weight, and how many layers take each width."""
        sizes = self.table.quantity("value_size")[self.free, codes[self.free]] * 8
        parameters = self.table.parameters[self.free]
        counts = Counter(np.round(sizes / parameters).astype(int).tolist())
        return sizes.sum() / parameters.sum(), ", ".join(f"{n}×{width}b" for width, n in sorted(counts.items()))

    def cells(self, codes: np.ndarray, others: list[np.ndarray]) -> list[str]:
        """Divergence and paired differences from other plans, on each of the held-out data."""
        cells = []
        for evaluator in self.evaluators:
            found = evaluator.measure(codes)
            cells.append(f"{found.divergence:.5f} ± {found.standard_error:.5f}")
            for other in others:
                if np.array_equal(other, codes):
                    cells.append("the same plan")
                    continue
                difference = found.per_sample - evaluator.measure(other).per_sample
                error = difference.std(ddof=1) / len(difference) ** 0.5
                cells.append(f"{difference.mean():+.5f} ± {error:.5f}")
        return cells


def budget(judge: Judge, bits: float) -> dict[str, float]:
    """Bytes of values that are so many bits a weight of the layers no pin names."""
    sizes = np.delete(judge.table.quantity("value_size"), judge.free, axis=0)
    return {"value_size": float(bits * judge.table.parameters[judge.free].sum() / 8 + np.nanmin(sizes, 1).sum())}


@dataclass(frozen=True)
class Ours:
    """Our table, solved for any bits: layers untied and, where a tool ties some, with its groups."""

    judge: Judge
    groups: tuple[tuple[str, ...], ...]
    budgets: tuple[str, ...]
    found: dict[float, list[np.ndarray]] = field(default_factory=dict)

    def at(self, bits: float) -> list[np.ndarray]:
        """Option indices of the untied plan, then of the tied one."""
        if bits not in self.found:
            table, position = self.judge.table, {str(unit): index for index, unit in enumerate(self.judge.table.units)}
            tied = replace(table, ties=[[position[name] for name in names] for names in self.groups])
            limit = budget(self.judge, bits)
            self.found[bits] = [choices_of(t, t.solve(limit)) for t in ((table, tied) if self.groups else (table,))]
        return self.found[bits]

    def beside(self, codes: np.ndarray) -> tuple[float, list[np.ndarray]]:
        """What a plan is compared with: ours at the budget it keeps to 1 %, else at its own bits."""
        bits, _ = self.judge.size(codes)
        near = [kept for kept in map(float, self.budgets) if 0.99 * kept <= bits <= kept * (1 + 1e-9)]
        asked = near[0] if near else bits
        return asked, self.at(asked)


def read_plan(judge: Judge, file: str) -> np.ndarray:
    """Option indices of a plan in a file."""
    content = json.loads(Path(file).read_text())
    if all(isinstance(width, int) for width in content.values()):
        return judge.codes(content)
    return choices_of(judge.table, mpq.Plan.load(file))


def searches(kind: str, given: dict[str, Any]) -> tuple[Search, list[Search]]:
    """Ours, which also says what the layers are, then every rival's."""
    how = SETTINGS[kind]
    bits = [float(value) for value in (given["bits"] or how["bits"]).split(",")]
    job = {
        "model": str(Path(given["model"].rpartition(":")[0]).resolve()) + ":" + given["model"].rpartition(":")[2],
        "widths": WIDTHS, "group": how["group"], "bits": bits, "folder": str(given["folder"].resolve()),
    }  # fmt: skip
    ours = {"method": how["ours"], "settings": how["settings"], "table": f"{job['folder']}/table.parquet"}
    ours |= {"pins": dict(pin.split("=") for pin in given["pins"]), "task": given["task"]}
    mine = Search.run(f"mpq, {how['ours']}", "mpq", sys.executable, job | ours)
    if not mine.answer:
        raise click.ClickException(f"our own search failed: {next(iter(mine.refused.values()))}")
    job["layers"] = mine.answer["layers"]
    runs = [
        (f"Model Optimizer, {method}", "model-optimizer", given["modelopt"], job | {"method": method})
        for method in (how["methods"] if given["modelopt"] else ())
    ]
    runs += [("AutoScheme", "auto-round", given["autoround"], job)] if given["autoround"] else []
    with ThreadPoolExecutor() as pool:
        return mine, list(pool.map(lambda run: Search.run(*run), runs))


def judge_of(given: dict[str, Any], mine: Search, group: int) -> Judge:
    """The table our search wrote, with the held-out data."""
    source = load_source(given["model"])
    table = mpq.CostTable.load(given["folder"] / "table.parquet")
    how = {"task": given["task"] or source.task, "kept_bytes": KEPT_BYTES, "cache": given["folder"]}
    evaluators = tuple(Evaluator(source.model, call_function(name), table, **how) for name in given["holdout"])
    free = np.flatnonzero(np.isin(table.units, list(mine.answer["layers"])))
    return Judge(table, free, evaluators, group)


def echo_row(asked: str, name: str, ours: Ours, codes: np.ndarray) -> None:
    """A plan's row."""
    bits, counts = ours.judge.size(codes)
    compared, others = ours.beside(codes)
    beside = "" if asked and float(asked) == compared else f" (less ours at {compared:.4g} bits)"
    over = " (over)" if asked and bits > float(asked) * (1 + 1e-9) else ""
    cells = " | ".join(ours.judge.cells(codes, others))
    click.echo(f"| {asked} | {name}{beside} | {bits:.3f}{over} | {counts} | {cells} |")


def echo_costs(found: list[Search]) -> None:
    """What each search took."""
    click.echo("\n| search, all budgets | version | CPU s | peak MB |\n|---|---|---|---|")
    for search in found:
        version = search.answer.get("version", "")
        click.echo(f"| {search.name} | {version} | {search.seconds:.0f} | {search.peak / 1e6:.0f} |")


def echo_table(ours: Ours, mine: Search, rivals: list[Search], given: dict[str, Any]) -> None:
    """All rows, budget by budget."""
    judge, heads = ours.judge, ["asked", "plan by", "bits", "layers"]
    for name in given["holdout"]:
        heads += [name.rpartition(":")[2], "less ours", *(["less ours, tied"] if ours.groups else [])]
    click.echo(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for bits in ours.budgets:
        rows = [(search.name, search.plans[bits]) for search in (mine, *rivals) if bits in search.plans]
        if float(bits) in WIDTHS:
            rows = [("uniform", dict.fromkeys(mine.answer["layers"], int(float(bits)))), *rows]
        for name, plan in rows:
            echo_row(bits, name, ours, judge.codes(plan))
        if ours.groups and bits in mine.plans:
            echo_row(bits, "mpq, tied", ours, ours.at(float(bits))[1])
        for search in (mine, *rivals):
            if bits in search.refused:
                reason = " ".join(search.refused[bits].split()).replace("|", "/")
                click.echo(f"| {bits} | {search.name} | | {reason} {'| ' * (len(heads) - 4)}|")
    for file in given["plans"]:
        echo_row("", Path(file).stem, ours, read_plan(judge, file))
    echo_costs([mine, *rivals])


@click.command()
@click.argument("kind", type=click.Choice(list(SETTINGS)))
@click.argument("model")
@click.option("--holdout", multiple=True, required=True)
@click.option("--modelopt", help="An interpreter with nvidia-modelopt.")
@click.option("--autoround", help="An interpreter with auto-round.")
@click.option("--bits")
@click.option("--pin", "pins", multiple=True)
@click.option("--task")
@click.option("--plan", "plans", multiple=True, help="A file, to be judged in the same run.")
@click.option("--folder", type=Path, help="Where jobs, answers and logs stay; a temporary one is deleted.")
def main(kind: str, **given: Any) -> None:
    """Search for widths with every tool and judge all plans of MODEL, FILE.py:function."""
    with tempfile.TemporaryDirectory() as temporary:
        given["folder"] = given["folder"] or Path(temporary)
        given["folder"].mkdir(parents=True, exist_ok=True)
        mine, rivals = searches(kind, given)
        judge = judge_of(given, mine, SETTINGS[kind]["group"])
        groups: list[list[str]] = next((search.answer["tied"] for search in rivals if search.answer.get("tied")), [])
        ours = Ours(judge, tuple(map(tuple, groups)), tuple({**mine.plans, **mine.refused}))
        echo_table(ours, mine, rivals, given)


if __name__ == "__main__":
    main()
