"""Things to draw and to show: a table with layers and a plan, small or of 200 layers, and hostile names."""

import numpy as np

from mpq.formats import parse
from mpq.layers import Layer
from mpq.tables import CostTable

OPTIONS = ("int2", "int4", "int8")


def table_of(layers=4, *, name="blocks.{}.fc", granularity="layer", **changed):
    """Sensitivities over decades, one of them 0 and one negative."""
    rng = np.random.default_rng(layers)
    widths = np.array([parse(option).bits for option in OPTIONS])
    sensitivity = 10 ** rng.normal(-2, 0.7, (layers, 1)) * 4.0 ** (2 - widths)
    sensitivity[0, 2], sensitivity[-1, 2] = 0.0, -1e-6
    shapes = [(8 * (1 + place % 3), 16) for place in range(layers)]
    described = tuple(
        Layer(name.format(place), "linear", shape, shape[0] * shape[1], 10 * shape[0], (1, 16), (1, shape[0]))
        for place, shape in enumerate(shapes)
    )
    size = np.array([[parse(option).storage_bits(shape) / 8 for option in OPTIONS] for shape in shapes])
    given = {
        "units": [layer.name for layer in described],
        "options": OPTIONS,
        "quantities": {
            "sensitivity": sensitivity,
            "sensitivity_se": np.abs(sensitivity) / 10,
            "size": size,
            "latency": size * 1e-6,
        },
        "measures": {"sensitivity": "loss"},
        "parameters": [layer.parameters for layer in described],
        "layers": described,
        "reference": {"size": float(sum(4 * layer.parameters for layer in described))},
        "fingerprint": "f",
    }
    return CostTable(**{**given, **changed})
