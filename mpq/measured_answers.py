"""What `--json` prints of measured searches: refine, smallest, evolve. The keys are stable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpq.json_answers import plan_answer

REFINEMENT_KEYS = {
    "plan": "as `mpq show --json`",
    "improved": "whether another plan than the first was confirmed to be better",
    "evaluations": "measurements of the whole data",
    "plans": "how many plans were measured",
    "stopped": "why the search ended",
    "selection": "start, best, p_value, samples on the data it was chosen by",
    "fresh": "the same on samples that no candidate was chosen by",
    "heldout": "the same on held-out data; or null",
    "front": "with --front: list of the measured plans that no other beats",
    "written": "files",
}
SMALLEST_KEYS = {
    "plan": "as `mpq show --json`; null where none was confirmed",
    "resource": "name and value of what was made small, in its base unit",
    "drop": "measured",
    "limit": "of the drop",
    "p_value": "chance to see this if the drop were not below the limit",
    "level": "of the test",
    "samples": "that were measured",
    "heldout": "drop, standard_error, samples on held-out data; or null",
    "unsure": "options of the smallest plan whose measured drop is within the limit, sure or not; or null",
    "history": "list of resource, drop and p_value of every plan measured",
    "stopped": "why the search ended before it was through; or empty",
    "written": "files",
}
EVOLUTION_KEYS = {
    "resources": "names of what was made small, in this order",
    "measured": "what was measured of a plan",
    "measures": "base units of the resources",
    "options": "list of names",
    "units": "list of names",
    "plans": "how many plans were measured",
    "samples": "that they were measured on, and chosen by",
    "stopped": "why the search ended",
    "points": "list of resources, value (measured), standard_error and choices, positions in options",
    "written": "files",
}


def refinement_answer(found: Any, *, front: str | None, written: Sequence[str]) -> dict[str, Any]:
    """`REFINEMENT_KEYS` of a refinement."""
    shown = None if front is None else found.evaluator.frontier(front).to_frame().to_dict(orient="records")
    return {
        "plan": plan_answer(found.plan),
        "improved": found.is_improved,
        "evaluations": found.evaluations,
        "plans": len(found.evaluator.measured),
        "stopped": found.stopped,
        "selection": found.selection.facts(),
        "fresh": found.fresh.facts(),
        "heldout": None if found.heldout is None else found.heldout.facts(),
        "front": shown,
        "written": list(written),
    }


def smallest_answer(found: Any, *, written: Sequence[str]) -> dict[str, Any]:
    """`SMALLEST_KEYS` of a search for the smallest plan."""
    facts = found.facts()
    return {
        "plan": None if found.plan is None else plan_answer(found.plan),
        "resource": {"name": found.resource_name, "value": found.resource},
        "drop": found.drop,
        "limit": found.limit,
        "p_value": facts["p_value"],
        "level": found.level,
        "samples": found.evaluator.samples,
        "heldout": facts["heldout"],
        "unsure": None if found.unsure is None else found.unsure.options,
        "history": [dict(zip(("resource", "drop", "p_value"), step, strict=True)) for step in found.history],
        "stopped": found.stopped,
        "written": list(written),
    }


def evolution_answer(front: Any, *, written: Sequence[str]) -> dict[str, Any]:
    """`EVOLUTION_KEYS` of a measured frontier."""
    errors = [None] * len(front) if front.standard_error is None else front.standard_error.tolist()
    points = zip(front.resource.reshape(len(front), -1).tolist(), front.objective.tolist(), errors, strict=True)
    names = ("resources", "value", "standard_error")
    return {
        "resources": list(front.names),
        "measured": front.objective_name,
        "measures": front.measures,
        "options": list(front.options),
        "units": list(front.layers),
        "plans": front.provenance["plans"],
        "samples": front.provenance["samples"],
        "stopped": front.provenance["stopped"],
        "points": [
            dict(zip(names, point, strict=True)) | {"choices": choices.tolist()}
            for point, choices in zip(points, front.choices, strict=True)
        ],
        "written": list(written),
    }
