"""What a notebook shows of a plan, a table, a frontier, an allocation and a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from mpq.budgets import format_quantity
from mpq.format_colours import bits_colour, option_bits
from mpq.html_card import bar, card, chip, chips, facts, staircase, strip, table
from mpq.options import Option
from mpq.picture import short_name, thinned

if TYPE_CHECKING:
    from mpq.allocation import Allocation, Proof
    from mpq.frontier import Frontier
    from mpq.frontier_gain import FrontierGain
    from mpq.layers import Network
    from mpq.plan import Entry, Plan
    from mpq.tables import CostTable

_NAME = 44  # characters of a layer's name; the whole of it is shown under the pointer
_POINTS = 12  # rows of a frontier
_OPTIONS = 8  # columns of a table of scores


def plan_card(plan: Plan) -> str:
    """A plan: formats in order, what was predicted and measured, budgets, the layers."""
    band = [
        (entry.layer.parameters, bits_colour(entry.value_bits), f"{entry.layer.name}: {entry.choice}")
        for entry in plan.entries
    ]
    rows = [
        (
            _name(entry.layer.name),
            entry.layer.kind,
            f"{entry.layer.parameters:,}",
            _choice(entry),
            f"{entry.value_bits:.3g}",
            format_quantity(entry.storage_bits / 8, "B"),
        )
        for entry in plan.entries
    ]
    header = ("layer", "kind", "weights", "option", "bits", "size")
    title = f"Plan: {_count(len(plan.entries), 'layer')}"
    if plan.entries:
        title += f", {plan.average_bits:.3f} bits a weight, {format_quantity(plan.size_bytes, 'B')}"
    mix = chips(_ordered(str(entry.choice) for entry in plan.entries if isinstance(entry.choice, Option)))
    return card(title, mix, strip(band), facts(_plan_facts(plan)), table(header, rows, left=(0, 1, 3), what="layers"))


def _plan_facts(plan: Plan) -> Iterable[tuple[str, str]]:
    shown = [
        f"{name} {format_quantity(value, plan.measures.get(name, ''))}"
        for name, value in plan.predicted.items()
        if name != "value_size"
    ]
    yield "predicted", ", ".join(shown)
    figures = [f"{name} {value:.4g}" for name, value in plan.measured.items() if not name.endswith("_se")]
    yield "measured on held-out data", ", ".join(figures)
    for budget in plan.budgets:
        yield "budget", budget.meaning
    if plan.proof is not None:
        yield "proof", _proof(plan.proof) + " for the predicted table"
    if plan.edited:
        yield "set by hand", ", ".join(plan.edited[:6]) + (f" and {len(plan.edited) - 6} more" * (len(plan.edited) > 6))


def table_card(costs: CostTable) -> str:
    """A cost table: what every quantity can come to, and the scores."""
    quantities = []
    for name in costs.quantities:
        if name.endswith("_se"):
            continue
        ends = [format_quantity(end, costs.measures[name]) for end in costs.reachable(name)]
        whole = costs.reference.get(name)
        shown = "" if whole is None else format_quantity(whole, costs.measures[name])
        quantities.append((name, costs.measures[name] or "–", costs.aggregates[name], *ends, shown))
    header = ("quantity", "unit", "adds up by", "least", "most", "as it stands")
    name = "sensitivity" if "sensitivity" in costs.quantities else next(iter(costs.quantities), "")
    # only rows that the page shows are made: a table may have a million units
    parts = [table(header, quantities, left=(0, 1, 2), what="quantities")]
    if name:
        shown_units = thinned(len(costs.units), 20)
        options = range(min(len(costs.options), _OPTIONS))
        rows = [
            (_name(str(costs.units[unit])), *(_entry(costs, name, unit, column) for column in options))
            for unit in shown_units
        ]
        beyond = len(costs.options) - _OPTIONS
        says = f"{name} of {_shown_of(len(rows), len(costs.units), 'unit')}"
        says += f"; {beyond} more options" if beyond > 0 else ""
        titles = ("unit", *(costs.options[column] for column in options))
        parts += [Markup('<div style="margin-top:8px;opacity:.65">{}</div>').format(says)]
        parts += [table(titles, rows, what="units")]
    title = f"Cost table: {_count(len(costs.units), 'unit')} × {_count(len(costs.options), 'option')}"
    return card(title, *parts, facts(_table_facts(costs)))


def _table_facts(costs: CostTable) -> Iterable[tuple[str, str]]:
    origin = costs.provenance
    if "sensitivity" in origin:
        yield "scored by", f"{str(origin['sensitivity']).split('(')[0]} on {origin.get('samples', '?')} samples"
    if target := origin.get("hardware", {}).get("target"):
        yield "priced on", str(target)
    if estimates := origin.get("estimates"):
        yield "rests on estimated device numbers", ", ".join(map(str, estimates))
    if costs.masked:
        yield "masked", f"{_count(len(costs.masked), 'option')} without a finite number, see table.masked"
    if costs.ties:
        yield "ties", _count(len(costs.ties), "group")


def _entry(costs: CostTable, name: str, unit: int, column: int) -> str:
    return f"{costs.quantities[name][unit, column]:.3g}" if costs.allowed[unit, column] else "–"


def frontier_card(front: Frontier) -> str:
    """A frontier: its shape, and points spread evenly over it."""
    what = (
        "measured " if front.is_measured else "predicted " if front.table is not None else ""
    ) + front.objective_name
    kept = thinned(len(front), _POINTS)
    rows = []
    resource = front.resource.reshape(len(front), -1)
    for index in kept:
        amounts = [_amount(front, column, value) for column, value in enumerate(resource[index])]
        error = "" if front.standard_error is None else f" ± {front.standard_error[index]:.2g}"
        mix = chips(_ordered(front.options[choice] for choice in front.choices[index]))
        rows.append((str(index), *amounts, f"{front.objective[index]:.4g}{error}", mix))
    header = ("point", *front.names, what + (" ± standard error" * (front.standard_error is not None)), "layers")
    picture: Markup | str = ""
    if len(front.names) == 1 and len(front) > 1:
        some = thinned(len(front), 200)
        label = f"{what} falls as {front.names[0]} grows"
        picture = staircase(front.resource[some].tolist(), front.objective[some].tolist(), label)
    title = f"Frontier: {_shown_of(len(rows), len(front), 'point')}, {' and '.join(front.names)} against {what}"
    columns = table(header, rows, left=(len(header) - 1,), what="points")
    return card(title, picture, facts(_frontier_facts(front)), columns)


def _frontier_facts(front: Frontier) -> Iterable[tuple[str, str]]:
    if front.epsilon:
        yield "left out", f"plans that are better by less than {front.epsilon:.2g} of what they cost"
    if front.is_heuristic:
        plans = front.provenance.get("plans")
        yield "found", f"among {plans} measured plans; better ones may exist" if plans else "by a search without proof"
    if front.is_restricted:
        yield "restricted", "to plans in the order of the priorities"


def _amount(front: Frontier, column: int, value: float) -> str:
    measure = front.measures.get(front.names[column])
    return f"{value:.6g}" if measure is None else format_quantity(float(value), measure)


def gain_card(gain: FrontierGain) -> str:
    """What one frontier gains on another: the sentence, and rows spread evenly over the resources."""
    frame, name = gain.frame, gain.first.names[0]
    kept = thinned(len(frame), _POINTS)
    rows = [
        (
            _amount(gain.first, 0, frame[name].iloc[index]),
            *(f"{frame[column].iloc[index]:.4g}" for column in frame.columns[1:]),
        )
        for index in kept
    ]
    return card(str(gain), table((name, *map(str, frame.columns[1:])), rows, left=(), what="rows"))


def allocation_card(allocation: Allocation) -> str:
    """An allocation: objective, resources, proof, and the option of every layer."""
    names = allocation.layers or tuple(f"layer {index}" for index in range(len(allocation.choices)))
    rows = [(_name(name), chip(option)) for name, option in zip(names, allocation.options, strict=True)]
    usage = ", ".join(f"{name} {value:.6g}" for name, value in allocation.usage.items())
    said = [("objective", f"{allocation.objective:.6g}"), ("takes", usage)]
    title = f"Allocation: {_count(len(rows), 'layer')}, {_proof(allocation.proof)}"
    return card(
        title, chips(_ordered(allocation.options)), facts(said),
        table(("layer", "option"), rows, left=(0, 1), what="layers"),
    )  # fmt: skip


def network_card(network: Network) -> str:
    """A network: its layers with their shares of weights and work."""
    weights = max(sum(layer.parameters for layer in network.layers), 1)
    macs = max(sum(layer.macs for layer in network.layers), 1)
    most = [max((getattr(layer, name) for layer in network.layers), default=0) for name in ("parameters", "macs")]
    rows = [
        (
            _name(layer.name),
            layer.kind,
            " × ".join(map(str, layer.weight_shape)),
            f"{layer.parameters:,}",
            bar(layer.parameters / weights, most[0] / weights),
            f"{layer.macs:,}",
            bar(layer.macs / macs, most[1] / macs),
        )
        for layer in network.layers
    ]
    header = (
        "layer",
        "kind",
        "weight (out, in…)",
        "weights",
        "share",
        f"MACs, {_count(network.batch, 'sample')}",
        "share",
    )
    said = [("ties", ", ".join(" + ".join(map(short_name, group)) for group in network.siblings[:4]))]
    said[0] = ("in one format", said[0][1] + (f" and {len(network.siblings) - 4} more" * (len(network.siblings) > 4)))
    skipped = [f"{name}: {reason}" for name, reason in network.skipped.items()]
    said.append(("not planned", "; ".join(skipped[:3]) + (f" and {len(skipped) - 3} more" * (len(skipped) > 3))))
    columns = table(header, rows, left=(0, 1, 2, 4, 6), what="layers")
    title = repr(network).removeprefix("Network(").removesuffix(")")
    return card(f"Network: {title}", facts(said), columns)


def _choice(entry: Entry) -> Markup:
    if isinstance(entry.choice, Option):
        return chip(str(entry.choice))
    return Markup("{}: {}").format(entry.choice.granularity, chips(entry.choice.counts().items()))


def _ordered(labels: Iterable[str]) -> Sequence[tuple[str, int]]:
    """Options and how often each is there, fewest bits first."""
    return sorted(Counter(labels).items(), key=lambda item: (float(np.nan_to_num(option_bits(item[0]))), item[0]))


def _name(name: str) -> Markup:
    return Markup('<span title="{}">{}</span>').format(name, short_name(name, _NAME))


def _proof(proof: Proof) -> str:
    gap = f", gap {proof.gap:.2g}" if proof.gap else ""
    return f"{proof.status}{gap}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _shown_of(shown: int, count: int, noun: str) -> str:
    return _count(count, noun) if shown == count else f"{shown} of {_count(count, noun)}"
