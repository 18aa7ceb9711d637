"""The dual-vision encoder: one CLIP ViT for images and videos, with local temporal units for videos only.

Frames are folded into the batch for spatial attention; only the temporal units and the mean class token combine them.
Axes: b batch, t frames, n patches per frame (n + 1 with the class token), w vision width, s = 1 + t*n.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from .config import Config
from .layers import Taps, tap

CLIP_EPS = 1e-5
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_pixels(frames: Tensor) -> Tensor:
    """Normalize decoded pixels, uint8 [b, t, y, x, 3], to the model's input, float32 [b, 3, t, y, x]."""
    mean, std = (torch.tensor(rgb, device=frames.device) for rgb in (PIXEL_MEAN, PIXEL_STD))
    return ((frames / 255.0 - mean) / std).permute(0, 4, 1, 2, 3)


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Resize the grid rows of a position table [1 + n, w], bilinear with half-pixel centers; keep the class row."""
    side = math.isqrt(table.shape[0] - 1)
    if side == grid:
        return table
    rows = table[1:].unflatten(0, (side, side)).permute(2, 0, 1)[None]
    rows = F.interpolate(rows, size=(grid, grid), mode="bilinear", align_corners=False)
    return torch.cat([table[:1], rows[0].permute(1, 2, 0).flatten(0, 1)])


class QuickGELU(nn.Module):
    """CLIP's activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute x * sigmoid(1.702 x)."""
        return x * torch.sigmoid(1.702 * x)


class LocalTemporal(nn.Module):
    """LN -> down-projection -> depthwise convolution over three frames -> QuickGELU -> up-projection.

    The convolutions hold the weights in the release's shapes; width stays the last axis, so two of them are linear maps
    and the third is three shifted products. Frames before the first and after the last are zero.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width, CLIP_EPS)
        self.down_proj = nn.Conv3d(width, width // 2, 1)
        self.conv = nn.Conv3d(width // 2, width // 2, (3, 1, 1), groups=width // 2)
        self.up_proj = nn.Conv3d(width // 2, width, 1)
        self.activation = QuickGELU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of every token of [b, t, n, w] from its own frame, the previous and the next."""
        y = F.linear(self.ln(x), self.down_proj.weight.flatten(1), self.down_proj.bias)
        previous, following = F.pad(y[:, :-1], (0, 0, 0, 0, 1, 0)), F.pad(y[:, 1:], (0, 0, 0, 0, 0, 1))
        kernel = self.conv.weight.flatten(1)
        y = previous * kernel[:, 0] + y * kernel[:, 1] + following * kernel[:, 2] + self.conv.get_parameter("bias")
        return F.linear(self.activation(y), self.up_proj.weight.flatten(1), self.up_proj.bias)


class FrameAttention(nn.Module):
    """Self attention within each frame, with the fused projection of ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.heads = heads
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each frame of [b*t, n + 1, w]."""
        fused = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        query, key, value = fused.permute(2, 0, 3, 1, 4)
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return out


class VisionBlock(nn.Module):
    """CLIP's pre-norm block, with a local temporal unit before each of its two halves."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, heads = config.vision_width, config.vision_heads
        self.lmhra1, self.lmhra2 = LocalTemporal(width), LocalTemporal(width)
        self.ln_1, self.ln_2 = nn.LayerNorm(width, CLIP_EPS), nn.LayerNorm(width, CLIP_EPS)
        self.attn = FrameAttention(width, heads)
        activation = QuickGELU() if config.vision_activation == "quick_gelu" else nn.GELU()
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": activation, "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Run the block on [b*t, n + 1, w], t = ``frames``; a single frame skips the temporal units."""
        x = self._temporal(self.lmhra1, x, frames)
        x = x + self.attn(self.ln_1(x))
        x = self._temporal(self.lmhra2, x, frames)
        return x + self.mlp(self.ln_2(x))

    @staticmethod
    def _temporal(unit: LocalTemporal, x: Tensor, frames: int) -> Tensor:
        """Add a temporal unit's update to the patches, not to the class token."""
        if frames == 1:
            return x
        update = unit(x[:, 1:].unflatten(0, (-1, frames))).flatten(0, 1)
        return x + F.pad(update, (0, 0, 1, 0))


class Transformer(nn.Module):
    """The blocks, under the release's name."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        blocks = (VisionBlock(config) for _ in range(config.vision_layers))
        self.resblocks = nn.ModuleList(blocks)


class VisionTower(nn.Module):
    """Patches -> blocks -> one class token (the mean over frames) and all patches of all frames."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, patch, grid = config.vision_width, config.patch_size, config.image_size // config.patch_size
        tubelet_size, stride = (3, 2) if config.temporal_downsampling else (1, 1)
        self.conv1 = nn.Conv3d(
            3, width, (tubelet_size, patch, patch), (stride, patch, patch), padding=(tubelet_size // 2, 0, 0),
            bias=False,
        )  # fmt: skip
        self.class_embedding = nn.Parameter(0.02 * torch.randn(width))
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(1 + grid**2, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width, CLIP_EPS), nn.LayerNorm(width, CLIP_EPS)
        self.transformer = Transformer(config)
        self.patch_size = patch

    def forward(self, frames: Tensor, taps: Taps | None = None) -> Tensor:
        """Encode normalized frames [b, 3, t, y, x], any number of any square size -> [b, s, w].

        Raises:
            UserError: the frames are not square, or their size is not a multiple of the patch size.
        """
        height, width = frames.shape[-2:]
        if height != width or height % self.patch_size:
            raise UserError(
                f"frames are {height}x{width} pixels, expected squares whose side is a multiple of patch_size="
                f"{self.patch_size}; resize or crop them"
            )
        x = self.conv1(frames.to(self.conv1.weight.dtype))  # [b, w, t, grid, grid]
        b, _, t, grid, _ = x.shape
        x = x.flatten(3).permute(0, 2, 3, 1).flatten(0, 1)  # [b*t, n, w]
        x = torch.cat([self.class_embedding.expand(b * t, 1, -1), x], dim=1)
        x = self.ln_pre(x + resize_positions(self.positional_embedding, grid))
        tap(taps, "vision/norm_pre", x)
        for i, block in enumerate(self.transformer.resblocks):
            x = block(x, t)
            tap(taps, "vision/block", x, layer=i)
        x = x.unflatten(0, (b, t))
        x = self.ln_post(torch.cat([x[:, :, 0].mean(1, keepdim=True), x[:, :, 1:].flatten(1, 2)], dim=1))
        tap(taps, "vision/out", x)
        return x
