"""Train the networks of `mpq.demo` again and write its three files: ``python -m mpq.demo_training [FOLDER]``.

Seeded and single-threaded, so the same machine writes the same bytes; another processor may round differently. Takes
about two minutes. The last epoch is taken as it is, and the recipes were settled on another random split.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from mpq import demo

SOURCE = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, "
    "doi:10.24432/C50P49, CC BY 4.0; the 1797 images that scikit-learn ships, split at random"
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """AdamW with a one-cycle learning rate on randomly turned, scaled and shifted images."""

    epochs: int
    learning_rate: float
    weight_decay: float = 0.05
    batch_size: int = 64
    turn: float = 0.17  # radians, either way
    scale: float = 0.07  # of the size, either way
    shift: float = 0.17  # of half the width, either way
    seed: int = 0


CNN_RECIPE = Recipe(epochs=60, learning_rate=4e-3)
TRANSFORMER_RECIPE = Recipe(epochs=200, learning_rate=3e-3)


def write_digits(folder: Path, seed: int = 1, held_out: int = 512) -> None:
    """Write ``demo_digits.safetensors``: images, labels, and the part every image belongs to.

    Raises:
        ImportError: if scikit-learn, where the images come from, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("training the demo needs scikit-learn: pip install 'mpq-search[train]'") from error
    source = load_digits()
    labels = torch.from_numpy(source.target).to(torch.uint8)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = torch.full_like(labels, demo.SPLITS.index("training"))
    parts[order[:held_out]] = demo.SPLITS.index("holdout")
    parts[order[held_out : 2 * held_out]] = demo.SPLITS.index("calibration")
    tensors = {"images": torch.from_numpy(source.images).to(torch.uint8), "labels": labels, "split": parts}
    (folder / "demo_digits.safetensors").write_bytes(save(tensors, {"source": SOURCE}))


def distort(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Turn, scale and shift every image by a random amount, float32 (n, 1, 8, 8) → the same shape."""
    count = len(images)
    amount = 2 * torch.rand(4, count, generator=generator) - 1
    angle, size = recipe.turn * amount[0], 1 + recipe.scale * amount[1]
    cos, sin, (across, down) = size * angle.cos(), size * angle.sin(), recipe.shift * amount[2:]
    rows = torch.stack([cos, -sin, across, sin, cos, down], dim=1)
    grid = F.affine_grid(rows.view(count, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
    """Train `model` in place on raw `images` and leave it in eval mode."""
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * math.ceil(len(images) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.2)
    model.train()
    for _ in range(recipe.epochs):
        for batch in torch.split(torch.randperm(len(images), generator=generator), recipe.batch_size):
            inputs = demo.normalise(distort(images[batch].float(), recipe, generator))
            loss = F.cross_entropy(model(inputs), labels[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of raw `images` that `model` labels correctly."""
    with torch.no_grad():
        predictions = model(demo.normalise(images)).argmax(1)
    return float((predictions == labels).float().mean())


def main() -> None:
    """Write the digits, then train each network on their training part and write its weights."""
    parser = argparse.ArgumentParser(prog="python -m mpq.demo_training", description="Train the demo networks again.")
    parser.add_argument("folder", nargs="?", type=Path, default=demo.FOLDER, help="where to write (default: mpq's)")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    write_digits(folder)
    for file, network, recipe in (
        ("demo_cnn.safetensors", demo.DigitsCNN, CNN_RECIPE),
        ("demo_transformer.safetensors", demo.DigitsTransformer, TRANSFORMER_RECIPE),
    ):
        torch.manual_seed(recipe.seed)
        model: nn.Module = network()
        train(model, *demo.split("training", folder), recipe)
        (folder / file).write_bytes(save(model.state_dict(), {"source": "python -m mpq.demo_training"}))
        print(file, *(f"{name} {accuracy(model, *demo.split(name, folder)):.4f}" for name in demo.SPLITS))


if __name__ == "__main__":
    main()
