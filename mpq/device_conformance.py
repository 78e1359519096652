"""What every device promises: subclass `DeviceConformance` and give it a fixture `device`.

    from mpq.device_conformance import DeviceConformance

    class TestMine(DeviceConformance):
        @pytest.fixture
        def device(self):
            return mpq.hardware_models.load("my-chip")

A network of four layers is priced in seven options; needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq.conformance import expect
from mpq.layers import Layer, Network
from mpq.options import SearchSpace

if TYPE_CHECKING:
    import pandas as pd

OPTIONS = ("fp32", "fp16", "int8/int8", "int8", "int4/int8", "int4", "int4@group32")
ATTRIBUTES = (
    "measures",
    "aggregates",
    "alive",
    "reference",
    "offsets",
    "limits",
    "transitions",
    "refused",
    "provenance",
)


def _layer(name: str, kind: str, shape: tuple[int, ...], positions: int, **fields: Any) -> Layer:
    parameters = int(np.prod(shape))
    given = {"weight_name": f"{name}.weight", "module": name, "weight_bytes": 4 * parameters, **fields}
    return Layer(name, kind, shape, parameters, parameters * positions, **given)


def small_layers() -> tuple[Layer, ...]:
    """Two convolutions, one of them depthwise, and two linear layers, run on one image."""
    image, deep = (1, 32, 8, 8), (1, 64, 8, 8)
    linear = {"input_shape": (1, 64), "output_shape": (1, 128)}
    return (
        _layer("conv", "conv2d", (64, 32, 3, 3), 64, input_shape=image, output_shape=deep, kernel=(3, 3)),
        _layer(
            *("depthwise", "conv2d", (64, 1, 3, 3), 64),
            input_shape=deep,
            output_shape=deep,
            kernel=(3, 3),
            groups=64,
        ),
        _layer("fc", "linear", (128, 64), 1, **linear),
        _layer("head", "linear", (32, 128), 1, input_shape=(1, 128), output_shape=(1, 32)),
    )


def small_network(*layers: Layer) -> Network:
    """The layers as a network with 100 bytes of biases."""
    layers = layers or small_layers()
    total = 100 + sum(layer.weight_bytes for layer in layers)
    return Network(layers, total_bytes=total, outside_bytes=100, fingerprint="small")


def priced(device: Any, options: Any = OPTIONS, network: Network | None = None, **run: Any) -> pd.DataFrame:
    """What the options of a small network cost."""
    network = small_network() if network is None else network
    frame: pd.DataFrame = device.costs(network, SearchSpace(options), **run)
    return frame


class DeviceConformance:
    """Promises of a device: a `mpq.hardware_models.Target`, or what has its method `costs`."""

    def test_every_layer_and_option_has_a_row(self, device: Any) -> None:
        """Rows are (layer, option label) in the order of layers and options; the attributes are all there."""
        frame = priced(device)
        expected = [(layer.name, option) for layer in small_layers() for option in OPTIONS]
        expect(list(frame.index) == expected, f"rows are (layer, option) in order, got {list(frame.index)}")
        missing = [name for name in ATTRIBUTES if name not in frame.attrs]
        expect(not missing, f"the frame's attrs hold {', '.join(ATTRIBUTES)}; missing: {missing}")
        unmeasured = sorted(set(map(str, frame.columns)) - set(frame.attrs["measures"]))
        expect(not unmeasured, f"every column has a base unit in attrs['measures']; {unmeasured} have none")
        absent = sorted({"size", "value_size", "bops"} - set(frame.columns))
        expect(not absent, f"size, value_size and bops are always there; missing: {absent}")

    def test_a_price_is_finite_or_refused_with_a_reason(self, device: Any) -> None:
        """A cell is priced in every column, or NaN in all and in attrs['refused'] with a reason."""
        frame = priced(device)
        empty = frame.isna()
        expect((empty.all(axis=1) == empty.any(axis=1)).all(), "a cell is priced in every column or in none")
        refused = {cell for cell in frame.index if empty.loc[cell].any()}
        told = frame.attrs["refused"]
        expect(set(told) == refused, f"what has no price is in attrs['refused']: {sorted(refused ^ set(told))} differ")
        expect(all(isinstance(why, str) and why for why in told.values()), f"each with a reason, got {told}")
        values = frame.to_numpy(dtype=np.float64)
        priced_values = values[~np.isnan(values)]
        right = np.isfinite(priced_values).all() and (priced_values >= 0).all()
        expect(right, "prices are finite and not negative")
        expect(len(refused) < len(frame), "it runs some option of some layer")

    def test_sizes_are_those_that_are_stored(self, device: Any) -> None:
        """Bytes, scales included, and multiply-adds times bits: the same on every device."""
        frame = priced(device)
        plain = priced(import_module("mpq.hardware_models").storage())
        for column in ("value_size", "bops"):
            same = np.isclose(frame[column], plain[column], rtol=1e-12) | frame[column].isna()
            expect(same.all(), f"{column} is {plain[column].to_dict()}, got {frame[column].to_dict()}")
        kept = frame["size"].isna() | (frame["size"] >= plain["size"] * (1 - 1e-12))
        expect(
            kept.all(), f"nothing is stored in fewer bytes than its values and scales, got {frame['size'].to_dict()}"
        )
        reference = frame.attrs["reference"]["size"]
        expect(reference == small_network().total_bytes, f"100 % of size is the model as it stands, got {reference}")

    def test_the_same_again_and_options_do_not_disturb_one_another(self, device: Any) -> None:
        """Prices depend on nothing but the arguments; a cell's does not on which other options are asked for."""
        first, again = priced(device), priced(device)
        expect(first.equals(again) and first.attrs["reference"] == again.attrs["reference"], "the same prices again")
        alone = priced(device, OPTIONS[:3])
        same = np.isclose(alone, first.loc[list(alone.index)], rtol=1e-12, equal_nan=True)
        expect(same.all(), "a cell costs the same whatever other options there are")

    def test_what_is_no_candidate_has_no_price(self, device: Any) -> None:
        """Options of one layer only are NaN in the others' rows."""
        frame = priced(device, {"*": ["fp32", "fp16", "int8/int8"], "fc": ["int8", "int4"]})
        others = [("fc", "fp32"), ("fc", "int8/int8"), ("head", "int8"), ("conv", "int4")]
        expect(frame.loc[others].isna().all(axis=None), "a layer's row of an option outside its candidates is NaN")

    def test_more_work_never_takes_less(self, device: Any) -> None:
        """Four times the batch: no quantity falls, and size and bops stay."""
        one, four = priced(device), priced(device, batch=4)
        expect(list(one.columns) == list(four.columns), "the batch does not change which quantities there are")
        for column in one.columns:
            before, after = one[column], four[column]
            expect((before.isna() == after.isna()).all(), f"nor what is refused, in {column}")
            if column in ("size", "value_size", "bops"):
                expect(np.isclose(before, after, equal_nan=True).all(), f"{column} does not depend on the batch")
            else:
                grows = after.isna() | (after >= before * (1 - 1e-12))
                expect(grows.all(), f"{column} of four samples is at least that of one")

    def test_layers_are_priced_one_by_one(self, device: Any) -> None:
        """Quantities that add up: a layer costs the same with another one beside it."""
        layers = small_layers()
        whole, part = priced(device), priced(device, network=small_network(*layers[2:]))
        for column in part.columns:
            if column in whole.columns and column not in whole.attrs["aggregates"]:
                same = np.isclose(part[column], whole[column].loc[list(part.index)], rtol=1e-9, equal_nan=True)
                expect(same.all(), f"{column} of a layer does not depend on the others")

    def test_limits_offsets_and_references_are_amounts(self, device: Any) -> None:
        """In base units: limits positive, offsets finite, 100 % of what has a reference more than nothing."""
        attributes = priced(device).attrs
        for name, value in attributes["limits"].items():
            expect(0 < value < np.inf, f"the limit of {name} is positive, got {value}")
        for name, value in attributes["offsets"].items():
            expect(np.isfinite(value), f"the offset of {name} is finite, got {value}")
        for name, value in attributes["reference"].items():
            expect(np.isfinite(value) and value > 0, f"100 % of {name} is a positive amount, got {value}")
        expect(str(attributes["provenance"].get("target", "")), "provenance names the target")

    def test_other_phases_are_priced_or_refused(self, device: Any) -> None:
        """Prefill and decode: a table, or a ValueError; an unknown phase or batch is always one."""
        for run in ({"phase": "prefill"}, {"phase": "decode"}, {"phase": "decode", "context": 64}):
            try:
                frame = priced(device, network=small_network(*small_layers()[2:]), **run)
            except ValueError as error:
                expect(str(error), f"a refusal of {run} says why")
                continue
            expect(len(frame) == 2 * len(OPTIONS), f"every layer and option is priced in {run}")
        for wrong in ({"phase": "sideways"}, {"batch": 0}):
            try:
                priced(device, **wrong)
            except ValueError:
                continue
            raise AssertionError(f"not kept: {wrong} is a ValueError")
