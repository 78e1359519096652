"""A plan as a tidy pandas frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from mpq.plan import Plan


def plan_frame(plan: Plan) -> pd.DataFrame:
    """One row a layer, in order: what it is, its option, and what it takes.

    The columns kind, weights, macs, option (text), bits (of a stored value; an average where the layer is split) and
    size; with the plan's table also what the table predicts for the layer as planned, its units added up, in every
    quantity that adds up. `attrs["measures"]` has the unit of each; terms of two layers together and what lies outside
    the layers are in `plan.predicted` alone.
    """
    import pandas as pd

    layers = [entry.layer for entry in plan.entries]
    frame = pd.DataFrame(
        {
            "kind": [layer.kind for layer in layers],
            "weights": np.array([layer.parameters for layer in layers], dtype=np.int64),
            "macs": np.array([layer.macs for layer in layers], dtype=np.int64),
            "option": [str(entry.choice) for entry in plan.entries],
            "bits": np.array([entry.value_bits for entry in plan.entries], dtype=np.float64),
            "size": np.array([entry.storage_bits / 8 for entry in plan.entries], dtype=np.float64),
        },
        index=pd.Index([layer.name for layer in layers], name="layer"),
    )
    frame.attrs["measures"] = {"bits": "bit", "size": "B"}
    table = plan.table
    if table is None:
        return frame
    from mpq.planning import choices_of

    choices, index = choices_of(table, plan), np.asarray(table.layer_index)
    for name, values in table.quantities.items():
        if name != "size" and not name.endswith("_se") and table.aggregates[name] == "sum":
            taken = values[np.arange(len(values)), choices]
            frame[name] = np.bincount(index, weights=taken, minlength=len(layers))
            frame.attrs["measures"][name] = table.measures[name]
    return frame
