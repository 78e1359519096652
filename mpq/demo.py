"""Two small trained networks and the data to plan them with, inside the package: nothing is downloaded.

Both read handwritten digits of 8×8 pixels. They are small enough to search in seconds and honest enough to show what
mixed precision is about: at ``int8`` nothing happens, at ``int4`` little, at ``int2`` they break, and their layers
differ in sensitivity by orders of magnitude.

Digits: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
doi:10.24432/C50P49, licence CC BY 4.0, in the selection of 1797 images that scikit-learn ships, split here at random.
Weights: trained by ``python -m mpq.demo_training``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]  # normalised images (n, 1, 8, 8), class indices (n,)
Model = TypeVar("Model", bound=nn.Module)
Split = Literal["training", "calibration", "holdout"]

SPLITS: tuple[Split, ...] = ("training", "calibration", "holdout")  # position: code in demo_digits.safetensors
FOLDER = Path(__file__).parent
PEAK, MEAN, STD = 16.0, 0.305, 0.376  # largest pixel; rounded mean and standard deviation of all pixels / PEAK


@dataclass(frozen=True)
class Digits:
    """Labelled batches of `digits`: disjoint from each other and from the images the networks were trained on."""

    calibration: list[Batch]
    holdout: list[Batch]


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions around a skip; where the shape changes, a 1×1 `downsample` convolution joins their sum."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) → (n, outputs, h / stride, w / stride)."""
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.downsample(x))


class SeparableBlock(nn.Module):
    """A depthwise 3×3 convolution, one filter a channel, and a pointwise one that mixes the channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        self.norm1 = nn.BatchNorm2d(inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) → (n, outputs, h, w)."""
        hidden = F.relu(self.norm1(self.depthwise(x)))
        return F.relu(self.norm2(self.pointwise(hidden)))


class DigitsCNN(nn.Module):
    """A residual network of 9 planned layers, 22 k weights; `block2.conv2` and its downsample are a natural tie."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.block1 = ResidualBlock(16, 16)
        self.block2 = ResidualBlock(16, 32, stride=2)
        self.separable = SeparableBlock(32, 64)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, 8, 8) → logits (n, 10)."""
        x = F.relu(self.norm(self.stem(x)))
        x = self.separable(self.block2(self.block1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Multi-head self-attention with q, k and v as layers of their own: a natural tie, as runtimes fuse them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def _by_head(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width) → (n, tokens, width)."""
        q, k, v = self._by_head(self.q(x)), self._by_head(self.k(x)), self._by_head(self.v(x))
        mixed = F.scaled_dot_product_attention(q, k, v)
        output: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return output


class EncoderBlock(nn.Module):
    """Attention and a GELU perceptron, each behind a layer norm and beside a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width) → (n, tokens, width)."""
        x = x + self.attention(self.norm1(x))
        output: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return output


class DigitsTransformer(nn.Module):
    """A vision transformer of 3 blocks over 16 patches of 2×2 pixels: 20 planned layers, 58 k weights."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(torch.zeros(1, 16, width))
        nn.init.normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, 8, 8) → logits (n, 10)."""
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


def cnn() -> DigitsCNN:
    """The trained residual network, in eval mode; it reads 99.0 % of the 512 holdout digits correctly.

    Example:
        >>> from mpq import demo
        >>> sum(weight.numel() for weight in demo.cnn().parameters())
        22554
    """
    with torch.device("meta"):
        model = DigitsCNN()
    return _with_weights(model, "demo_cnn.safetensors")


def transformer() -> DigitsTransformer:
    """The trained vision transformer, in eval mode; it reads 97.9 % of the 512 holdout digits correctly.

    Example:
        >>> from mpq import demo
        >>> model = demo.transformer()
        >>> model.training, len(model.blocks)
        (False, 3)
    """
    with torch.device("meta"):
        model = DigitsTransformer()
    return _with_weights(model, "demo_transformer.safetensors")


def digits(batch_size: int = 64) -> Digits:
    """512 images to calibrate with and 512 to judge by, none of them seen in training.

    Example:
        >>> from mpq import demo
        >>> inputs, targets = demo.digits().holdout[0]
        >>> inputs.shape, targets.shape
        (torch.Size([64, 1, 8, 8]), torch.Size([64]))
        >>> demo.cnn()(inputs).shape
        torch.Size([64, 10])

    Raises:
        ValueError: if `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return Digits(calibration=_batches("calibration", batch_size), holdout=_batches("holdout", batch_size))


def split(name: Split, folder: Path = FOLDER) -> Batch:
    """All images of one part, as stored: pixels 0 … 16, uint8 (n, 1, 8, 8), and their class indices, int64 (n,).

    Example:
        >>> from mpq import demo
        >>> {name: len(demo.split(name)[1]) for name in demo.SPLITS}
        {'training': 773, 'calibration': 512, 'holdout': 512}

    Raises:
        ValueError: if there is no part of that name.
    """
    if name not in SPLITS:
        raise ValueError(f"name must be one of {', '.join(SPLITS)}, got {name!r}")
    stored = load_file(folder / "demo_digits.safetensors")
    mine = stored["split"] == SPLITS.index(name)
    return stored["images"][mine].unsqueeze(1), stored["labels"][mine].long()


def normalise(images: Tensor) -> Tensor:
    """Pixels 0 … 16 → the networks' input: float32 of about zero mean and unit variance.

    Example:
        >>> import torch
        >>> from mpq import demo
        >>> round(demo.normalise(torch.tensor(16)).item(), 4)  # (1 - 0.305) / 0.376
        1.8484
    """
    return (images.float() / PEAK - MEAN) / STD


def _batches(name: Split, batch_size: int) -> list[Batch]:
    images, labels = split(name)
    inputs, targets = torch.split(normalise(images), batch_size), torch.split(labels, batch_size)
    return list(zip(inputs, targets, strict=True))


def _with_weights(model: Model, file: str) -> Model:
    """Built on the meta device, so that no random number is drawn for weights that are overwritten."""
    model.to_empty(device="cpu").load_state_dict(load_file(FOLDER / file))
    return model.eval()
