"""Networks of several tasks: transformers, an MLP-Mixer, a ResNet and a U-Net."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Build linear layers with an activation between any two."""
    layers: list[nn.Module] = []
    for i, (source, target) in enumerate(itertools.pairwise(widths)):
        layers += [activation()] if i else []
        layers.append(nn.Linear(source, target))
    return nn.Sequential(*layers)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, width] -> [B, T, width]."""
        q, k, v = (  # [B, heads, T, width of a head]
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        read = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(read.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Decoder-only transformer with learned positions."""

    def __init__(self, words: int, tokens: int, width: int, blocks: int, heads: int):
        super().__init__()
        self.word, self.place = nn.Embedding(words, width), nn.Embedding(tokens, width)
        for embedding in (self.word, self.place):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Compute the logits of the next token at each position, [B, T] -> [B, T, words]."""
        x = self.word(text) + self.place(torch.arange(text.shape[1], device=text.device))
        return self.head(self.norm(self.blocks(x)))


class ViT(nn.Module):
    """Vision transformer for images of 32 x 32 pixels."""

    def __init__(self, width: int = 64, blocks: int = 3, heads: int = 4, patch: int = 8):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.place = nn.Embedding((32 // patch) ** 2, width)
        nn.init.normal_(self.place.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Compute class logits, [B, 3, 32, 32] -> [B, 10]."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x + self.place.weight)).mean(1))


class MixerBlock(nn.Module):
    """Block of MLP-Mixer: an MLP across patches and one across channels."""

    def __init__(self, patches: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = mlp(patches, 2 * patches, patches, activation=nn.GELU)
        self.along = mlp(width, 2 * width, width, activation=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, patches, width] -> [B, patches, width]."""
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.along(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer for images of 32 x 32 pixels."""

    def __init__(self, width: int = 64, blocks: int = 3, patch: int = 8):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        count = (32 // patch) ** 2
        self.blocks = nn.Sequential(*(MixerBlock(count, width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Compute class logits, [B, 3, 32, 32] -> [B, 10]."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class Residual(nn.Module):
    """Residual block of two convolutions with BatchNorm."""

    def __init__(self, source: int, target: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(source, target, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(target)
        self.conv2 = nn.Conv2d(target, target, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(target)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(source, target, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, source, H, W] -> [B, target, H / stride, W / stride]."""
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.short(x))


class ResNet8(nn.Module):
    """ResNet of three residual blocks."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Residual(width, width, 1),
            Residual(width, 2 * width, 2),
            Residual(2 * width, 4 * width, 2),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Compute class logits, [B, 3, H, W] -> [B, 10]."""
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class UNet(nn.Module):
    """U-Net of two levels, with skip connections by concatenation."""

    def __init__(self, channels: int = 3, width: int = 16):
        super().__init__()
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.down1 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up1 = nn.Conv2d(4 * width, 2 * width, 3, padding=1)
        self.up2 = nn.Conv2d(3 * width, width, 3, padding=1)
        self.leave = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, H, W] -> [B, channels, H, W]."""
        wide = F.relu(self.enter(x))
        half = F.relu(self.down1(wide))
        deep = F.relu(self.middle(F.relu(self.down2(half))))
        deep = F.relu(self.up1(torch.cat([F.interpolate(deep, scale_factor=2.0), half], 1)))
        deep = F.relu(self.up2(torch.cat([F.interpolate(deep, scale_factor=2.0), wide], 1)))
        return self.leave(deep)
