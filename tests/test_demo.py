"""The embedded networks are good, small, reproducible, judged on unseen images, and worth mixed precision."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq import demo, demo_training

NETWORKS = {"cnn": demo.cnn, "transformer": demo.transformer}


@pytest.fixture(params=NETWORKS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return NETWORKS[request.param]()


@torch.no_grad()
def measure(model: nn.Module, batches: list[demo.Batch]) -> tuple[float, float]:
    """Accuracy and mean cross entropy."""
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits = model(inputs)
    return float((logits.argmax(1) == targets).float().mean()), float(F.cross_entropy(logits, targets))


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Symmetric integers, one scale an output channel, by a loop over the channels."""
    peak = 2 ** (bits - 1)
    channels = []
    for channel in weight:
        scale = channel.abs().max() / (peak - 1)
        channels.append((channel / scale).round().clamp(-peak, peak - 1) * scale)
    return torch.stack(channels)


def layer_weights(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def round_in_place(weights: list[Tensor], bits: int) -> None:
    with torch.no_grad():
        for weight in weights:
            weight.copy_(rounded(weight, bits))


def test_accuracy_on_unseen_images(model: nn.Module) -> None:
    assert not model.training
    assert measure(model, demo.digits().holdout)[0] >= 0.97
    assert measure(model, demo.digits().calibration)[0] >= 0.95


def test_uniform_int2_breaks_and_uniform_int4_nearly_does_not(model: nn.Module) -> None:
    holdout = demo.digits().holdout
    full, _ = measure(model, holdout)
    exact = {name: value.clone() for name, value in model.state_dict().items()}
    accuracies = {}
    for bits in (2, 4, 8):
        model.load_state_dict(exact)
        round_in_place(layer_weights(model), bits)
        accuracies[bits], _ = measure(model, holdout)
    assert accuracies[2] < 0.6
    assert full - 0.04 < accuracies[4]
    assert full - 0.005 < accuracies[8]


def test_layers_differ_in_sensitivity(model: nn.Module) -> None:
    calibration = demo.digits().calibration
    _, loss = measure(model, calibration)
    rises = []
    for weight in layer_weights(model):
        saved = weight.detach().clone()
        round_in_place([weight], 2)
        rises.append(measure(model, calibration)[1] - loss)
        with torch.no_grad():
            weight.copy_(saved)
    assert max(rises) > 0.05
    assert sorted(rises)[len(rises) // 4] < max(rises) / 10


def test_structure_has_what_a_plan_must_handle() -> None:
    convolutions = [m for m in demo.cnn().modules() if isinstance(m, nn.Conv2d)]
    assert any(m.groups == m.in_channels > 1 for m in convolutions), "depthwise"
    assert isinstance(demo.cnn().block2.downsample, nn.Sequential)
    assert isinstance(demo.cnn().block1.downsample, nn.Identity)
    assert any(isinstance(m, nn.BatchNorm2d) for m in demo.cnn().modules())
    attention = demo.transformer().blocks.get_submodule("0.attention")
    assert [name for name, _ in attention.named_children()] == ["q", "k", "v", "out"]


def test_loading_is_deterministic_and_draws_no_random_number() -> None:
    for load in NETWORKS.values():
        before = torch.random.get_rng_state()
        first, second = load(), load()
        assert torch.equal(before, torch.random.get_rng_state())
        for name, value in first.state_dict().items():
            other = second.state_dict()[name]
            assert torch.equal(value, other), name
            assert value.data_ptr() != other.data_ptr(), f"{name}: a change to one model would reach the other"
        assert all(weight.requires_grad for weight in first.parameters())


def test_files_are_small() -> None:
    size = {path.name: path.stat().st_size for path in demo.FOLDER.glob("demo_*.safetensors")}
    assert set(size) == {"demo_cnn.safetensors", "demo_transformer.safetensors", "demo_digits.safetensors"}
    assert size["demo_cnn.safetensors"] + size["demo_transformer.safetensors"] < 500_000
    assert size["demo_digits.safetensors"] < 150_000


def test_parts_share_no_image() -> None:
    pixels: list[set[bytes]] = [{image.numpy().tobytes() for image in demo.split(name)[0]} for name in demo.SPLITS]
    assert [len(part) for part in pixels] == [773, 512, 512]
    assert len(set.union(*pixels)) == 773 + 512 + 512


def test_digits_are_the_stored_images_normalised_in_order() -> None:
    data = demo.digits(batch_size=100)
    for batches, (images, labels) in (
        (data.calibration, demo.split("calibration")),
        (data.holdout, demo.split("holdout")),
    ):
        assert [len(targets) for _, targets in batches] == [100] * 5 + [12]
        assert torch.equal(torch.cat([inputs for inputs, _ in batches]), demo.normalise(images))
        assert torch.equal(torch.cat([targets for _, targets in batches]), labels)
        assert labels.dtype == torch.int64
        assert set(labels.tolist()) == set(range(10))


def test_normalised_training_images_are_standardised() -> None:
    images = demo.normalise(demo.split("training")[0])
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1) < 0.01


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        demo.digits(batch_size=0)
    with pytest.raises(ValueError, match="name must be one of training, calibration, holdout, got 'test'"):
        demo.split("test")  # type: ignore[arg-type]


def test_stored_digits_are_those_of_the_source(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come from scikit-learn")
    demo_training.write_digits(tmp_path)
    for name in demo.SPLITS:
        for again, shipped in zip(demo.split(name, tmp_path), demo.split(name), strict=True):
            assert torch.equal(again, shipped), name


def test_training_repeats_itself_and_learns() -> None:
    images, labels = demo.split("training")
    recipe = demo_training.Recipe(epochs=2, learning_rate=4e-3)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        model = demo.DigitsCNN()
        demo_training.train(model, images, labels, recipe)
        states.append(model.state_dict())
    assert not model.training
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert demo_training.accuracy(model, images, labels) > 0.5


def test_distortion_moves_pixels_within_bounds() -> None:
    images = demo.split("training")[0][:32].float()
    still = demo_training.Recipe(epochs=1, learning_rate=1.0, turn=0.0, scale=0.0, shift=0.0)
    moving = demo_training.Recipe(epochs=1, learning_rate=1.0)
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(demo_training.distort(images, still, generator), images, atol=1e-4, rtol=0)
    moved = demo_training.distort(images, moving, generator)
    assert moved.shape == images.shape
    assert (moved - images).abs().amax((1, 2, 3)).min() > 0.5
    assert moved.min() >= 0
    assert moved.max() <= demo.PEAK + 1e-4


def test_training_without_scikit_learn_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"mpq-search\[train\]"):
        demo_training.write_digits(tmp_path)
    assert not list(tmp_path.iterdir())


def test_using_the_demo_needs_no_scikit_learn() -> None:
    code = "import sys, mpq.demo, mpq.demo_training; mpq.demo.digits(); assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
