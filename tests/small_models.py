"""Small models and data that tests of several files use."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class SmallCNN(nn.Module):
    """Two convolutions with an in-place ReLU, a depthwise one, a transposed one and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = functional.relu(self.first(images), inplace=True)
        hidden = hidden + self.depthwise(hidden)
        return self.head(self.up(hidden).mean((2, 3)))


class SmallDecoder(nn.Module):
    """A token model with tied embedding and head, (batch, positions) to (batch, positions, vocabulary)."""

    def __init__(self, vocabulary: int = 11, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        hidden = self.embed(input_ids)
        mixed = functional.scaled_dot_product_attention(
            self.q(hidden)[:, None], self.k(hidden)[:, None], self.v(hidden)[:, None], is_causal=True
        )
        return {"logits": self.lm_head(hidden + self.o(mixed[:, 0]))}


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return SmallCNN().eval()


def images(batches: int = 2, samples: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(samples, 1, 6, 6, generator=generator), torch.randint(0, 5, (samples,), generator=generator))
        for _ in range(batches)
    ]


def decoder() -> nn.Module:
    torch.manual_seed(0)
    return SmallDecoder().eval()


def tokens(batches: int = 2, samples: int = 3, positions: int = 7) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(0, 11, (samples, positions), generator=generator)} for _ in range(batches)]
