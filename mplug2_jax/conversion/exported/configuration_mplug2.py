"""The config of an exported folder, for transformers' ``AutoConfig``."""

from typing import Any, ClassVar

from transformers import PretrainedConfig

from .mplug2_runtime import find_old

if problem := find_old("transformers", "4.50"):
    raise ImportError(f"{problem}: pip install -U transformers")


class Mplug2Config(PretrainedConfig):
    """The sizes of the model, by the names of ``mplug2_torch/conversion/torch_runtime/config.py``."""

    model_type = "mplug2"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "width", "num_hidden_layers": "decoder_layers", "num_attention_heads": "heads"
    }  # fmt: skip

    def __init__(self, **fields: Any) -> None:
        # The decoder's words are its output; its padding is 0.
        super().__init__(**{"tie_word_embeddings": True, "pad_token_id": 0, "is_encoder_decoder": True} | fields)
