"""Measured kernels: robust orders on this machine, ratios that survive other work, rows that survive interruptions."""

import time
from itertools import cycle

import numpy as np
import pytest

import mpq.hardware_models as hardware
from mpq.hardware_models.cells import Cells
from mpq.hardware_models.kernels import Callback, Kernel, NoKernel, kernels_of, kernels_of_shapes
from mpq.hardware_models.lookup_table import read_lookup_table
from mpq.hardware_models.measured import REFERENCE, Timing, machine, measure_kernels, ratio_of
from mpq.hardware_models.measured_device import device_text
from mpq.hardware_models.onnxruntime_kernels import OnnxRuntimeKernels
from mpq.hardware_models.torch_kernels import TorchKernels
from mpq.layers import Layer, Network
from mpq.options import Option, SearchSpace

QUICK = Timing(repeats=1, most=1, rounds=2, warm_up=1, shortest_s=0)


@pytest.fixture(scope="module")
def onnxruntime():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    return OnnxRuntimeKernels()


def waiting(seconds):
    """A kernel that takes a while, and counts its runs."""

    def run():
        run.count += 1
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    run.count = 0
    return run


def layer(kind, weight_shape, read, written, **more):
    weights = int(np.prod(weight_shape))
    macs = weights * int(np.prod(written[2:] if kind.startswith("conv") else written[:-1]))
    return Layer("x", kind, weight_shape, weights, macs, read, written, weight_bytes=4 * weights, **more)


LAYERS = [
    layer("linear", (12, 8), (1, 5, 8), (1, 5, 12)),
    layer("conv2d", (12, 8, 3, 3), (1, 8, 9, 7), (1, 12, 9, 7), kernel=(3, 3)),
    layer("conv2d", (12, 8, 3, 3), (1, 8, 10, 8), (1, 12, 5, 4), kernel=(3, 3)),
    layer("conv2d", (12, 4, 1, 1), (1, 8, 9, 7), (1, 12, 9, 7), kernel=(1, 1), groups=2),
    layer("conv2d", (8, 1, 5, 5), (1, 8, 9, 9), (1, 8, 9, 9), kernel=(5, 5), groups=8),
    layer("conv1d", (12, 8, 3), (1, 8, 20), (1, 12, 10), kernel=(3,)),
    layer("conv3d", (12, 8, 3, 3, 3), (1, 8, 4, 4, 4), (1, 12, 4, 4, 4), kernel=(3, 3, 3)),
]


@pytest.mark.parametrize("source", [OnnxRuntimeKernels(), TorchKernels()], ids=["onnxruntime", "torch"])
@pytest.mark.parametrize("own", LAYERS, ids=lambda own: f"{own.kind}-{own.groups}-{own.output_shape}")
def test_a_layer_becomes_a_kernel_with_its_output(source, own):
    """The kernel's output is the layer's: it does the layer's work, at its stride and with its window."""
    if isinstance(source, OnnxRuntimeKernels):
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx")
    (kernel,) = kernels_of(Cells.of(Network((own,)), []))
    run = source(kernel)
    output = run()
    shape = tuple(run.result.shape if output is None else output.shape)
    expected = (kernel.m, kernel.n) if own.kind == "linear" else own.output_shape
    assert shape == tuple(expected)


def test_a_transposed_convolution_slides_over_its_input(onnxruntime):
    own = Layer(
        "x",
        "conv_transpose2d",
        (6, 8, 2, 2),
        192,
        192 * 25,
        (1, 8, 5, 5),
        (1, 6, 10, 10),
        kernel=(2, 2),
        weight_bytes=768,
    )
    (kernel,) = kernels_of(Cells.of(Network((own,)), []))
    run = onnxruntime(kernel)
    run()
    assert run.result.shape == own.output_shape


def test_products_are_right(onnxruntime):
    """What is timed multiplies: fp32 against numpy, int8 against integers, blocks against the values they store."""
    random = np.random.default_rng
    x = random(0).integers(0, 100, (3, 64)).astype(np.float64)
    run = onnxruntime(Kernel("linear", 3, 64, 16))
    run()
    weight = random(1).normal(size=(64, 16))
    assert run.result == pytest.approx(x @ weight, rel=1e-4, abs=1e-2)

    run = onnxruntime(Kernel("linear", 3, 64, 16, weight="int8", activation="int8"))
    run()
    whole = 0.01 * 0.01 * ((x - 128) @ random(1).integers(-100, 100, (64, 16)))
    assert np.abs(run.result - np.clip(np.rint(whole / 0.01) + 128, 0, 255)).max() <= 1

    run = onnxruntime(Kernel("linear", 3, 64, 16, weight="int4@group32"))
    run()
    packed = random(1).integers(0, 256, (16, 2, 16)).astype(np.uint8)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(16, 64)
    exact = x @ (0.01 * (codes.astype(float) - 8)).T
    assert np.abs(run.result - exact).max() < 0.02 * np.abs(exact).max()


REFUSED = [
    ("linear", "int4", "int8"),
    ("linear", "int4@group24", "fp32"),
    ("linear", "bf16", "bf16"),
    ("conv2d", "int2", "fp32"),
    ("conv2d", "int4@group32", "fp32"),
    ("conv_transpose2d", "int8", "int8"),
]


@pytest.mark.parametrize(("kind", "weight", "activation"), REFUSED)
def test_what_onnxruntime_has_not_is_named(onnxruntime, kind, weight, activation):
    sizes = (16, 64, 64, 1, 4) if kind.startswith("conv") else (16, 64, 64, 1, 1)
    with pytest.raises(NoKernel, match=f"onnxruntime .*{kind}|blocks of|convolutions"):
        onnxruntime(Kernel(kind, *sizes, weight, activation))


def median_ratio(source, kernel, against, rounds=15):
    """Median of ratios of times taken in turn."""
    first, second = source(kernel), source(against)
    return ratio_of(first, second, Timing(repeats=5, most=5, rounds=rounds)).ratio


def test_int8_is_faster_than_fp32_at_64_rows(onnxruntime):
    fp32 = Kernel("linear", 64, 1024, 1024)
    int8 = Kernel("linear", 64, 1024, 1024, weight="int8", activation="int8")
    assert median_ratio(onnxruntime, int8, fp32) < 1


def test_4_bit_is_faster_than_fp32_at_one_row_of_a_large_matrix(onnxruntime):
    fp32 = Kernel("linear", 1, 2048, 2048)
    int4 = Kernel("linear", 1, 2048, 2048, weight="int4@group32")
    assert median_ratio(onnxruntime, int4, fp32, rounds=6) < 1


def test_ratio_is_that_of_the_work():
    ratio = ratio_of(waiting(6e-4), waiting(2e-4), Timing(rounds=6))
    assert ratio.ratio == pytest.approx(3, rel=0.2)
    assert ratio.seconds == pytest.approx(6e-4, rel=0.2)
    assert ratio.reference_s == pytest.approx(2e-4, rel=0.2)


class Hours:
    """A clock that stands still but for what functions add to it."""

    now = 0.0

    def __call__(self):
        return self.now

    def taking(self, seconds):
        """A function that takes the next of these, over and over."""
        turns = cycle(seconds)

        def run():
            self.now += next(turns)

        return run


def test_the_ratio_is_the_median_of_repeats_and_a_repeat_the_smallest_of_its_rounds():
    """A slower machine keeps the ratio of 2; a reference that is fast once by chance does not count."""
    clock = Hours()
    run = clock.taking([4, 4, 8, 12, 20, 12, 4, 9, 4])
    reference = clock.taking([2, 7, 2, 6, 6, 9, 1, 2, 2])
    timing = Timing(repeats=3, most=3, rounds=3, warm_up=1, shortest_s=0, longest_s=1e9)
    warm = 1 + 3 + 1  # before the repeats: warm-up, three to choose the rounds by, one to bound them
    for _ in range(9 - warm % 9):
        run(), reference()
    ratio = ratio_of(run, reference, timing, clock)
    assert (ratio.ratio, ratio.seconds, ratio.reference_s) == (2, 4, 1)
    assert ratio.spread == 1


def test_other_work_in_single_rounds_does_not_count():
    """Every second round is disturbed; the smallest of the rounds is not."""
    state = {"run": 0}

    def disturbed():
        state["run"] += 1
        waiting(2e-4 * (1 + 10 * (state["run"] % 2)))()

    ratio = ratio_of(disturbed, waiting(2e-4), Timing(rounds=6, shortest_s=0))
    assert ratio.ratio == pytest.approx(1, rel=0.2)


def test_repeats_are_added_while_they_differ():
    random = np.random.default_rng(0)

    def erratic():
        waiting(float(random.uniform(1e-4, 1e-3)))()

    erratic_runs, steady_runs = waiting(0), waiting(0)

    def counted(run, counter):
        def both():
            counter()
            run()

        return both

    ratio = ratio_of(counted(erratic, erratic_runs), waiting(2e-4), Timing(rounds=1, warm_up=1, shortest_s=0))
    ratio_of(counted(waiting(4e-4), steady_runs), waiting(2e-4), Timing(rounds=1, warm_up=1, shortest_s=0))
    assert erratic_runs.count > steady_runs.count
    assert ratio.spread >= 0


def fake_source(times, calls, name="fake 1.0"):
    def make(kernel):
        calls.append(kernel)
        if kernel.weight == "int4":
            return None
        if kernel.weight == "nf4":
            raise NoKernel("no such luck")
        return waiting(times.get(kernel.weight, 1e-4))

    return Callback(name, make)


SHAPES = [("linear", 1, 8, 4, 1, 1), ("linear", 2, 8, 4, 1, 1)]


def test_a_callback_is_measured_and_told_apart(tmp_path):
    calls = []
    source = fake_source({"int8": 1e-4, "fp32": 3e-4}, calls)
    pairs = [("int8", "int8"), ("fp32", "fp32"), ("int4", "fp32"), ("nf4", "fp32")]
    kernels = kernels_of_shapes(SHAPES, pairs)
    measured = measure_kernels(kernels, source, timing=Timing(rounds=5))
    assert calls[0] == REFERENCE
    assert [kernel.key for kernel in kernels if kernel.weight in ("int8", "fp32")] == measured.table.kernel_keys
    latency = measured.table.quantities["latency"]
    assert latency[1] / latency[0] == pytest.approx(3, rel=0.3)
    assert latency[1] == pytest.approx(3e-4, rel=0.3)
    reasons = {kernel.weight: reason for kernel, reason in measured.refused.items()}
    assert reasons["nf4"] == "no such luck"
    assert reasons["int4"].startswith("fake 1.0 has no kernel for linear")


def test_an_interrupted_measurement_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "mine.csv"
    pairs = [("int8", "int8"), ("fp32", "fp32")]
    kernels = kernels_of_shapes(SHAPES, pairs)
    calls = []
    working = fake_source({}, calls)

    def stopping(kernel):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return working(kernel)

    with pytest.raises(KeyboardInterrupt):
        measure_kernels(kernels, Callback("fake 1.0", stopping), path=path, timing=QUICK)
    kept = read_lookup_table(path)
    assert len(kept) == 2
    calls.clear()
    measured = measure_kernels(kernels, working, path=path, timing=QUICK)
    assert calls == [REFERENCE, *kernels[2:]]
    assert measured.table.kernel_keys == [kernel.key for kernel in kernels]
    assert measured.table.remarks["ratio"][:2] == kept.remarks["ratio"]
    again = read_lookup_table(path)
    assert again.quantities["latency"].tolist() == measured.table.quantities["latency"].tolist()


def test_latencies_of_one_table_share_a_reference(tmp_path):
    measured = measure_kernels(
        kernels_of_shapes(SHAPES, [("int8", "int8"), ("fp32", "fp32")]), fake_source({}, []), timing=QUICK
    )
    remarks = measured.table.remarks
    fastest = min(map(float, remarks["reference [s]"]))
    expected = [float(ratio) * fastest for ratio in remarks["ratio"]]
    assert measured.table.quantities["latency"] == pytest.approx(expected, rel=1e-4)


def test_rows_of_another_runtime_are_not_mixed_in(tmp_path):
    path = tmp_path / "mine.csv"
    kernels = kernels_of_shapes(SHAPES, [("int8", "int8")])
    measure_kernels(kernels, fake_source({}, []), path=path, timing=QUICK)
    with pytest.raises(
        ValueError, match=r"'mine.csv' was measured by another runtime or machine \(fake 1.0; .*delete it"
    ):
        measure_kernels(kernels, fake_source({}, [], "fake 2.0"), path=path, timing=QUICK)


def test_a_source_without_kernels_or_reference_is_told():
    with pytest.raises(ValueError, match="the reference kernel is needed: none has no kernel for linear m=64"):
        measure_kernels([], Callback("none", lambda kernel: None))
    with pytest.raises(ValueError, match="fake 1.0 has none of the 1 kernels: no such luck"):
        measure_kernels([Kernel("linear", 1, 8, 4, weight="nf4")], fake_source({}, []), timing=QUICK)


def test_long_kernels_get_fewer_rounds():
    slow = waiting(2e-2)
    ratio_of(slow, waiting(1e-4), Timing(rounds=50, repeats=1, most=1, warm_up=1, longest_s=0.1))
    assert slow.count < 12


def test_a_network_is_measured_and_priced(onnxruntime, tmp_path):
    fc = Layer("fc", "linear", (16, 32), 512, 512 * 6, (2, 3, 32), (2, 3, 16), batch=2, weight_bytes=2048)
    shape = (2, 8, 4, 4)
    conv = Layer("c", "conv2d", (8, 8, 3, 3), 576, 576 * 32, shape, shape, batch=2, kernel=(3, 3), weight_bytes=2304)
    network, options = Network((fc, conv), batch=2), ["int8/int8", "int4", "int4/int8"]
    kernels = kernels_of(Cells.of(network, [Option.parse(text) for text in options]))
    measured = measure_kernels(kernels, onnxruntime, path=tmp_path / "mine.csv", timing=QUICK)
    (tmp_path / "mine.toml").write_text(device_text("mine", "mine.csv", measured, QUICK, "2026-11"), encoding="utf-8")
    target = hardware.load(tmp_path / "mine.toml")
    costs = target.costs(network, SearchSpace(options))
    for kind, name in (("linear", "fc"), ("conv2d", "c")):
        for option, (weight, activation) in (("int8/int8", ("int8", "int8")), ("int4", ("int4", "fp32"))):
            at = next(
                i for i, k in enumerate(measured.table.kernel_keys) if (k[0], *k[6:]) == (kind, weight, activation)
            )
            assert costs.loc[(name, option), "latency"] == measured.table.quantities["latency"][at]
        assert np.isnan(costs.loc[(name, "int4/int8"), "latency"])
    assert costs.attrs["estimates"] == ()
    assert "int4 x int8 in conv2d" in target.notes
    assert target.runtime == onnxruntime.name
    assert machine() in target.sources[0].title


def test_torch_runs_what_it_has():
    source = TorchKernels()
    assert source(Kernel("linear", 32, 64, 48, weight="int8", activation="int8"))().shape == (32, 48)
    assert source(Kernel("linear", 32, 64, 48, weight="bf16", activation="bf16"))().dtype.itemsize == 2
    for kernel in (Kernel("linear", 1, 8, 4, weight="int4"), Kernel("conv2d", 16, 72, 8, 1, 9, "int8", "int8")):
        with pytest.raises(NoKernel, match="torch has no kernel"):
            source(kernel)


def test_made_up_images_have_the_right_number_of_positions():
    shapes = [("conv2d", 196, 72, 16, 1, 9), ("conv2d", 7, 14, 16, 1, 7), ("depthwise_conv2d", 49, 9, 1, 8, 9)]
    shapes += [("conv1d", 20, 24, 16, 1, 3), ("conv3d", 27, 216, 16, 1, 27), ("conv_transpose2d", 25, 8, 24, 1, 4)]
    for kernel in kernels_of_shapes(shapes, [("fp32", "fp32")]):
        assert np.prod(kernel.image[2:]) == kernel.m
        assert np.prod(kernel.window) == kernel.taps
        inputs, outputs = kernel.channels
        assert inputs * outputs // kernel.repeats * kernel.taps == kernel.k * kernel.n * kernel.repeats
