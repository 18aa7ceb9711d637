"""Text encoder and fusion encoder.

The last layers of the text encoder are universal: ordinary layers for text, while visual tokens go through the same
self attention and MLP, with latents and cross attention that text does not use.
"""

import torch
from torch import Tensor, nn

from .config import Config
from .layers import BertLayer, Embeddings, Encoder, Taps, broadcast_mask, tap


class TextEncoder(nn.Module):
    """BERT. Without ``text`` only its universal layers exist, for visual tokens."""

    def __init__(self, config: Config, *, text: bool) -> None:
        super().__init__()
        lower = [BertLayer(config, cross=False) for _ in range(config.text_layers if text else 0)]
        universal = [BertLayer(config, cross=True, latents=i == 0) for i in range(config.universal_layers)]
        if text:
            self.embeddings = Embeddings(config)
        self.encoder = Encoder([*lower, *universal], first=config.text_layers - len(lower))
        self._lower = len(lower)

    def forward(self, ids: Tensor, mask: Tensor, taps: Taps | None = None) -> Tensor:
        """Encode token ids [b, l] with their mask -> text tokens [b, l, d], through the universal layers too."""
        x = self.embeddings(ids)
        tap(taps, "text/embed", x)
        for i, layer in enumerate(self.encoder.layers):
            x = layer(x, broadcast_mask(mask))
            if i < self._lower:
                tap(taps, "text/layer", x, layer=i)
            else:
                tap(taps, "universal/text", x, layer=i - self._lower)
        tap(taps, "text/out", x)
        return x

    def encode_visual(self, v: Tensor, taps: Taps | None = None) -> Tensor:
        """Return the universal layers' update of the visual tokens ``v`` [b, s, d].

        Latents attend to ``v`` in every layer but the last, where ``v`` attends to them. Every layer reads the
        original ``v``.
        """
        *latent_layers, last = self.encoder.layers[self._lower :]
        latents = (latent_layers or [last])[0].latents.expand(v.shape[0], -1, -1)
        for i, layer in enumerate(latent_layers):
            latents = layer(latents, None, v)
            tap(taps, f"universal/visual{i}", latents)
        out: Tensor = last(v, None, latents)
        tap(taps, f"universal/visual{len(latent_layers)}", out)
        return out


class FusionEncoder(nn.Module):
    """Text attends to itself, then to the visual tokens; every stride-th layer may attend jointly over both."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._joint = config.joint_attention_layers
        layers = (BertLayer(config, cross=j not in self._joint) for j in range(config.fusion_layers))
        self.encoder = Encoder(layers, first=config.fusion_start)

    def forward(
        self, text: Tensor, text_mask: Tensor, visual: Tensor, taps: Taps | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the visual tokens [b, s, d] (changed only by joint attention) and the fused text [b, l, d]."""
        first = 0  # of the run of cross-attention layers that share a tap
        for j, layer in enumerate(self.encoder.layers):
            if j in self._joint:
                mask = torch.cat([text_mask.new_ones(visual.shape[:2]), text_mask], dim=1)
                joint = layer(torch.cat([visual, text], dim=1), broadcast_mask(mask))
                # As in the release, the visual output is added, and the text output replaces the text.
                visual, text = visual + joint[:, : visual.shape[1]], joint[:, visual.shape[1] :]
                tap(taps, f"fusion/layer{j}", text)
                first = j + 1
            else:
                text = layer(text, broadcast_mask(text_mask), visual)
                tap(taps, f"fusion/layers_from{first}", text, layer=j - first)
        return visual, text
