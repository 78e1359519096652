"""What every export target promises: subclass `ExporterConformance` and give it a fixture `exporter`.

    from mpq.exporter_conformance import ExporterConformance

    class TestMine(ExporterConformance):
        @pytest.fixture
        def exporter(self):
            return my_package.TARGET  # an mpq.exporting.ExportTarget

Plans of a few linear layers, by the names that transformers gives a Llama's, in many formats.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from mpq.conformance import expect
from mpq.exported_layers import is_unquantised
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import Entry, Plan, Split, weight_format

OPTIONS = (
    *("fp32", "bf16", "int2", "int3", "int4", "int8", "int4@group32", "int8@tensor", "int4@mse", "uint4", "uint8"),
    *("int8/int8", "int8/int8@token", "int4/uint8@token", "fp8_e4m3", "fp8_e4m3/fp8_e4m3", "mxfp4", "nvfp4", "nf4"),
    *("q4_0", "q8_0", "q4_k", "bcq2", "int12"),
)
DOWN, OUT = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"


def linear_layer(name: str, rows: int, columns: int) -> Layer:
    """A linear layer with weights in fp32, run on one token."""
    shape, size = (rows, columns), rows * columns
    given = {"weight_name": f"{name}.weight", "module": name, "weight_bytes": 4 * size}
    return Layer(name, "linear", shape, size, size, (1, columns), (1, rows), **given)  # type: ignore[arg-type]


def small_layers() -> tuple[Layer, ...]:
    """Two linear layers that no runtime fuses."""
    return linear_layer(OUT, 64, 64), linear_layer(DOWN, 64, 128)


def plan_of(options: Mapping[Layer, Option | Split]) -> Plan:
    """A plan."""
    return Plan(tuple(Entry(layer, option) for layer, option in options.items()), "small", outside={"size": 100.0})


def check_applied(exporter: Any, option: Option) -> None:
    """Apply an option to one of two layers, and compare with the simulation, without its rounding of inputs.

    Raises:
        AssertionError: if the weights are not on the planned grid, the other layer changed, or the error is another.
    """
    import torch

    from mpq.fake_quantize import fake_quantize

    layer, other = linear_layer("0", 64, 64), linear_layer("1", 32, 64)
    generator = torch.Generator().manual_seed(0)
    linears = [torch.nn.Linear(64, rows, bias=False) for rows in (64, 32)]
    for linear in linears:
        linear.weight.data.normal_(generator=generator)
    exact, left = (linear.weight.detach().clone() for linear in linears)
    model = torch.nn.Sequential(*linears).eval()
    exporter.apply(model, plan_of({layer: option, other: Option("fp32")}))
    with torch.no_grad():
        applied, untouched = model[0](torch.eye(64)).T, model[1](torch.eye(64)).T
    expect(torch.equal(untouched, left), "a layer in fp32 is left as it was")
    fmt = weight_format(option)
    error, planned = float((applied - exact).norm()), float((fake_quantize(exact, fmt) - exact).norm())
    of_inputs = 0.0 if option.activation is None else 0.02 * float(exact.norm())
    near = 0.5 * planned <= error <= 1.5 * planned + of_inputs
    expect(near, f"the error of {option} is that of its simulation, {planned:.3g}, got {error:.3g}")
    if option.activation is None and fmt.bits < 8:
        blocks = applied.reshape(-1, 32)
        levels = max(
            len(torch.unique((block / block.abs().max().clamp_min(1e-30)).round(decimals=4))) for block in blocks
        )
        expect(levels <= 2**fmt.bits, f"{option} has at most {2**fmt.bits} levels a row, got {levels}")


class ExporterConformance:
    """Promises of an `mpq.exporting.ExportTarget`; a subclass has the fixture `exporter`.

    Attributes:
        settings: keyword arguments that `emit` cannot do without.
        writes_inputs: the formats of layer inputs are in the export; False where the library has them elsewhere.
    """

    settings: Mapping[str, Any] = {}
    writes_inputs: bool = True

    def emitted(self, exporter: Any, options: Mapping[Layer, Option | Split]) -> Any:
        """What the exporter makes of a plan."""
        return exporter.emit(plan_of(options), **self.settings)

    def taken(self, exporter: Any) -> list[Option]:
        """The options that it can hold in both layers."""
        options = [Option.parse(text) for text in OPTIONS]
        return [
            option for option in options if all(exporter.refused(layer, option) is None for layer in small_layers())
        ]

    def test_it_holds_some_formats_and_says_why_not_the_others(self, exporter: Any) -> None:
        """`refused` returns None or a reason, the same every time, and raises nothing."""
        for layer, text in itertools.product(small_layers(), OPTIONS):
            first, again = (exporter.refused(layer, Option.parse(text)) for _ in range(2))
            right = first is None or (isinstance(first, str) and first.strip())
            expect(right, f"refused is None or says why, got {first!r} for {text}")
            expect(first == again, f"and says the same again, got {first!r}, then {again!r}")
        quantised = [option for option in self.taken(exporter) if not is_unquantised(option)]
        expect(quantised, f"it can hold one quantised format of {', '.join(OPTIONS)}")

    def test_what_is_not_refused_is_exported_and_what_is_refused_is_an_error(self, exporter: Any) -> None:
        """`refused` and `emit` agree, option by option, so that a search for this target can be exported."""
        layers = small_layers()
        held = next(option for option in self.taken(exporter) if not is_unquantised(option))
        for text in OPTIONS:
            option = Option.parse(text)
            reason = exporter.refused(layers[0], option)
            try:
                self.emitted(exporter, {layers[0]: option, layers[1]: held})
            except ValueError as error:
                expect(reason is not None, f"what is not refused is exported: {text} raised {error!r}")
                named = layers[0].name in str(error) and str(option) in str(error)
                expect(named, f"an error names the layer and the option, {layers[0].name} and {option}: {error}")
                continue
            expect(reason is None, f"what is refused is no export but a ValueError: {text}, refused since {reason}")

    def test_exports_are_plain_data_and_text(self, exporter: Any) -> None:
        """A dict that `json.dumps` takes, the same every time, and a text that is not empty."""
        for option in self.taken(exporter):
            options = dict.fromkeys(small_layers(), option)
            if is_unquantised(option):
                continue
            first, again = self.emitted(exporter, options), self.emitted(exporter, options)
            expect(isinstance(first, dict) and first, f"an export is a dict, got {first!r}")
            try:
                told = json.dumps(first)
            except (TypeError, ValueError) as error:
                raise AssertionError(f"not kept: an export is plain data, json.dumps says {error}") from error
            expect(told == json.dumps(again), f"the same plan gives the same export, got {first}, then {again}")
            text = exporter.text(first)
            expect(isinstance(text, str) and text.strip(), f"its text is not empty, got {text!r}")

    def test_every_layer_gets_its_own_option(self, exporter: Any) -> None:
        """Two formats exchanged between two layers, or one format in both: another export."""
        first, second = small_layers()
        taken = self.taken(exporter)
        for one, other in itertools.combinations(taken, 2):
            if is_unquantised(one) and is_unquantised(other):
                continue
            if one.weight == other.weight and not self.writes_inputs:
                continue
            held = other if is_unquantised(one) else one
            plans = ((one, other), (other, one), (held, held))
            exports = [json.dumps(self.emitted(exporter, {first: a, second: b})) for a, b in plans]
            different = len(set(exports)) == len(exports)
            expect(different, f"which layer has {one} and which {other} is in the export, got {exports}")

    def test_a_split_layer_is_exported_or_refused(self, exporter: Any) -> None:
        """A layer whose rows have several formats: most libraries cannot hold it, and then it is a ValueError."""
        first, second = small_layers()
        options = self.taken(exporter)[-2:]
        held = next(option for option in self.taken(exporter) if not is_unquantised(option))
        split = Split("rows:32", tuple(options), np.array([0, 1], np.uint8)) if len(options) == 2 else None
        if split is None:
            return
        try:
            found = self.emitted(exporter, {first: split, second: held})
        except ValueError as error:
            expect(first.name in str(error), f"the error names the layer, got {error}")
            return
        whole = [json.dumps(self.emitted(exporter, {first: option, second: held})) for option in options]
        expect(json.dumps(found) not in whole, "a split layer is not exported as if it had one option")

    def test_what_it_applies_is_what_was_planned(self, exporter: Any) -> None:
        """Where it has `apply`: weights are on the planned grid, others as they were, and outputs as simulated."""
        if getattr(exporter, "apply", None) is None:
            return
        for option in self.taken(exporter):
            if not is_unquantised(option):
                check_applied(exporter, option)
