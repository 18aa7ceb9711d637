"""Text encoder and fusion encoder.

The last layers of the text encoder are universal: text passes through them as through ordinary layers, and the visual
tokens through the same self attention and MLP, with latents and cross attention that only they use.
"""

import torch
from torch import Tensor, nn

from mplug2_jax.conversion.torch_runtime.config import Config
from mplug2_jax.conversion.torch_runtime.layers import BertLayer, Embeddings, Encoder, Taps, broadcast_mask, tap


class TextEncoder(nn.Module):
    """BERT. Without ``text`` only its universal layers exist, for the visual tokens."""

    def __init__(self, config: Config, *, text: bool) -> None:
        super().__init__()
        lower = [BertLayer(config, cross=False) for _ in range(config.text_layers if text else 0)]
        universal = [BertLayer(config, cross=True, latents=i == 0) for i in range(config.universal_layers)]
        if text:
            self.embeddings = Embeddings(config)
        self.encoder = Encoder([*lower, *universal], first=config.text_layers - len(lower))
        self._lower = len(lower)

    def forward(self, ids: Tensor, mask: Tensor, taps: Taps | None = None) -> Tensor:
        """Token ids [b, l] and their mask -> text tokens [b, l, d], through the universal layers too."""
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

    def visual(self, v: Tensor, taps: Taps | None = None) -> Tensor:
        """What the universal layers add to the visual tokens ``v`` [b, s, d].

        Latents gather from ``v`` in every layer but the last, where ``v`` attends to them. Every layer reads the
        unprocessed ``v``.
        """
        *gathering, last = self.encoder.layers[self._lower :]
        latents = (gathering or [last])[0].latents.expand(v.shape[0], -1, -1)
        for i, layer in enumerate(gathering):
            latents = layer(latents, None, v)
            tap(taps, f"universal/visual{i}", latents)
        out: Tensor = last(v, None, latents)
        tap(taps, f"universal/visual{len(gathering)}", out)
        return out


class FusionEncoder(nn.Module):
    """Text attends to itself, then to the visual tokens; every stride-th layer may mix the two in one attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._mixing = config.mixing_layers
        layers = (BertLayer(config, cross=j not in self._mixing) for j in range(config.fusion_layers))
        self.encoder = Encoder(layers, first=config.fusion_start)

    def forward(
        self, text: Tensor, text_mask: Tensor, visual: Tensor, taps: Taps | None = None
    ) -> tuple[Tensor, Tensor]:
        """The visual stream [b, s, d] (changed by mixing layers only) and the fused text [b, l, d]."""
        first = 0  # of the run of reading layers that share a tap
        for j, layer in enumerate(self.encoder.layers):
            if j in self._mixing:
                mask = torch.cat([text_mask.new_ones(visual.shape[:2]), text_mask], dim=1)
                both = layer(torch.cat([visual, text], dim=1), broadcast_mask(mask))
                # As in the release, the image's part is added to it, the text's replaces it.
                visual, text = visual + both[:, : visual.shape[1]], both[:, visual.shape[1] :]
                tap(taps, f"fusion/layer{j}", text)
                first = j + 1
            else:
                text = layer(text, broadcast_mask(text_mask), visual)
                tap(taps, f"fusion/layers_from{first}", text, layer=j - first)
        return visual, text
