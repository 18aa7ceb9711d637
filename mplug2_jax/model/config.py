"""Model sizes, from one table, and the parts that a model is composed of."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from mplug2_jax.errors import UserError, check_range, did_you_mean
from mplug2_jax.fields import Execution

Remat = Literal["none", "dots", "full"]
AttentionKernel = Literal["auto", "xla", "fused", "splash", "cudnn"]
MatmulPrecision = Literal["default", "high", "highest"]

PARTS: Mapping[str, str] = {
    "vision": "dual-vision encoder: one CLIP ViT for images and videos",
    "temporal": "local temporal units in the vision tower, for videos only",
    "text": "text encoder: embeddings and BERT's layers below the universal layers",
    "universal": "layers shared by text and vision; with vision also latents and cross attention",
    "fusion": "text cross-attends to the visual tokens",
    "decoder": "shared decoder with its head: answers, captions, labels, boxes",
    "mlm": "masked language modeling head, tied to the text encoder's word embeddings",
    "contrastive": "projections and temperature of the vision-language contrastive loss (VLC)",
    "matching": "image-text matching head (VLM) on the fused [CLS]",
    "classifier": "class logits from the visual [CLS], or from the text's without vision",
}
_PREREQUISITES = {
    "temporal": ("vision",), "fusion": ("text", "vision"), "mlm": ("text",), "contrastive": ("text", "vision"),
    "matching": ("fusion",),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Token ids with a meaning for objectives and decoding; by default those of BERT's uncased vocabulary."""

    pad: int = 0
    begin: int = 101
    end: int = 102
    mask: int = 103


@dataclasses.dataclass(frozen=True, kw_only=True)
class RematConfig:
    """Rematerialization of each tower: what the backward pass recomputes.

    ``none`` saves every activation, ``dots`` the outputs of matmuls, ``full`` only the inputs of layers.
    """

    vision: Remat = "none"  # vision tower
    text: Remat = "none"  # text encoder and universal layers
    fusion: Remat = "none"  # fusion module
    decoder: Remat = "none"  # decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and numerics of a model. Make one with :func:`model_config`, which starts from the table below."""

    vision_width: int  # of the vision tower; a multiple of vision_heads
    vision_layers: int  # of the vision tower
    vision_heads: int  # of the vision tower
    vision_activation: Literal["quick_gelu", "gelu"] = "quick_gelu"  # of its MLPs: the release's, or LAION's
    patch_size: int  # pixels per patch side; divides image_size
    image_size: int  # pixels; the grid of the position table, which is resized for other image sizes
    width: int  # of everything except the vision tower
    heads: int  # of everything except the vision tower
    mlp_width: int  # of everything except the vision tower
    text_layers: int  # below the universal layers: N - S in the paper
    universal_layers: int = 2  # S in the paper
    num_latents: int = 50  # K in the paper: learnable queries of the universal layers
    fusion_layers: int  # of the fusion module
    fusion_stride: int = 0  # every stride-th fusion layer is a joint self attention over image and text; 0: none
    decoder_layers: int  # of the shared decoder
    vocab_size: int = 30522  # rows of the word embeddings, at least the tokenizer's vocabulary
    max_positions: int = 512  # largest text length
    positions_init: Literal["normal", "sincos", "zeros"] = "normal"  # of vision; the release drops CLIP's: "zeros"
    temporal_downsampling: bool = False  # tubelets of 3 frames, stride 2; off in every released model
    contrastive_width: int = 256  # of the features that VLC compares
    num_classes: int = 0  # of the part "classifier"
    init_std: float = 0.02  # of kernels outside the vision tower; BERT's, narrow models need more
    dropout: float = 0.1  # of hidden states outside the vision tower
    attention_dropout: float = 0.1  # of attention probabilities there; flash kernels need 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of compute; parameters, softmax, norms, losses: float32
    matmul_precision: MatmulPrecision = "default"  # of float32 matmuls on TPUs and GPUs; exact only with "highest"
    attention: Execution[AttentionKernel] = "auto"  # kernel; auto: the fastest for the device and the shapes
    remat: Execution[RematConfig] = RematConfig()
    scan_unroll: Execution[int] = 1  # layers per scan iteration; >= the depth: no loop (exact costs, faster on CPUs)

    def __post_init__(self) -> None:
        """Check that the sizes fit together.

        Raises:
            UserError: names the field, the value found and the values expected.
        """
        for name in (
            "vision_width", "vision_heads", "patch_size", "image_size", "width", "heads", "mlp_width", "vocab_size",
            "max_positions", "num_latents", "contrastive_width", "scan_unroll",
        ):  # fmt: skip
            check_range(f"config.model.{name}", getattr(self, name), 1)
        for name in (
            "vision_layers", "text_layers", "universal_layers", "fusion_layers", "fusion_stride", "decoder_layers",
            "num_classes",
        ):  # fmt: skip
            check_range(f"config.model.{name}", getattr(self, name), 0)
        check_range("config.model.init_std", self.init_std, 0)
        for name in ("dropout", "attention_dropout"):
            check_range(f"config.model.{name}", getattr(self, name), 0, 0.99)
        for width, heads in (("vision_width", "vision_heads"), ("width", "heads")):
            if getattr(self, width) % getattr(self, heads):
                raise UserError(
                    f"config.model.{width}={getattr(self, width)} does not divide into "
                    f"config.model.{heads}={getattr(self, heads)} heads; choose a multiple"
                )
        if self.image_size % self.patch_size:
            raise UserError(
                f"config.model.image_size={self.image_size} is not a multiple of config.model.patch_size="
                f"{self.patch_size}; the nearest sizes are {self.image_size // self.patch_size * self.patch_size} and "
                f"{-(-self.image_size // self.patch_size) * self.patch_size}"
            )

    @property
    def num_patches(self) -> int:
        """Return the number of patches per frame at the configured image size."""
        return (self.image_size // self.patch_size) ** 2

    def num_tubelets(self, frames: int) -> int:
        """Return the number of tubelets along time in a clip of ``frames`` frames: the frames of the tower's blocks."""
        return (frames - 1) // 2 + 1 if self.temporal_downsampling and frames > 1 else frames

    def num_visual_tokens(self, frames: int, image_size: int | None = None) -> int:
        """Return the length of the visual sequence: one class token, then every patch of every frame."""
        num_patches = self.num_patches if image_size is None else (image_size // self.patch_size) ** 2
        return 1 + self.num_tubelets(frames) * num_patches


# fmt: off
_BERT_BASE = {
    "width": 768, "heads": 12, "mlp_width": 3072, "text_layers": 10, "fusion_layers": 3, "decoder_layers": 12,
}
_BERT_LARGE = {
    "width": 1024, "heads": 16, "mlp_width": 4096, "text_layers": 22, "fusion_layers": 6, "decoder_layers": 12,
}
_VIT_B16 = {"vision_width": 768, "vision_layers": 12, "vision_heads": 12, "patch_size": 16, "image_size": 224}
_VIT_L14 = {"vision_width": 1024, "vision_layers": 24, "vision_heads": 16, "patch_size": 14, "image_size": 224}

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "vision_width": 128, "vision_layers": 4, "vision_heads": 4, "patch_size": 8, "image_size": 32,
        "width": 128, "heads": 4, "mlp_width": 512, "text_layers": 1, "universal_layers": 1, "fusion_layers": 1,
        "decoder_layers": 2, "num_latents": 8, "vocab_size": 512, "max_positions": 64, "contrastive_width": 64,
        "init_std": 0.07,
    },
    "base": {**_VIT_B16, **_BERT_BASE},
    "large": {**_VIT_L14, **_BERT_LARGE},
}
# fmt: on


def model_config(size: str, **overrides: Any) -> ModelConfig:
    """Return a config from the table, with any field replaced.

    Raises:
        UserError: an unknown size or field; names the nearest valid one.

    Example:
        >>> model_config("base", dtype="float32").vision_width
        768
    """
    if size not in SIZES:
        raise UserError(f"config.model.size='{size}' is unknown: {did_you_mean(size, SIZES)}")
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    for name in overrides:
        if name not in fields:
            raise UserError(f"config.model.{name} is not a field of the model: {did_you_mean(name, fields)}")
    return ModelConfig(**{**SIZES[size], **overrides})


def check_has_parts(
    what: str, needed: Iterable[str], parts: Sequence[str], *, model: str = "this model", advice: str = ""
) -> None:
    """Check that a model has the parts that something needs, but for the universal layers, which a run may disable.

    Args:
        what: needs them, for the error.
        needed: the parts, in the order in which the error names them.
        parts: of the model.
        model: which one it is, for the error.
        advice: what to do, for the error.

    Raises:
        UserError: names the missing parts.
    """
    missing = [part for part in needed if part not in (*parts, "universal")]
    if missing:
        raise UserError(
            f"{what} needs the parts {', '.join(missing)}, which {model} lacks (it has {', '.join(parts)}){advice}"
        )


def check_parts(parts: tuple[str, ...], config: ModelConfig) -> None:
    """Check that a list of parts makes a model.

    Raises:
        UserError: an unknown part, or one whose prerequisites are missing.
    """
    for part in parts:
        if part not in PARTS:
            raise UserError(f"part '{part}' is unknown: {did_you_mean(part, PARTS)}")
        missing = [required for required in _PREREQUISITES.get(part, ()) if required not in parts]
        if missing:
            raise UserError(f"part '{part}' needs {' and '.join(missing)}, but the parts are: {', '.join(parts)}")
    if "classifier" in parts and config.num_classes < 2:
        raise UserError(f"part 'classifier' needs config.model.num_classes >= 2, found {config.num_classes}")
    if not set(parts) & {"vision", "text"}:
        raise UserError(f"a model needs 'vision' or 'text', but the parts are: {', '.join(parts) or 'none'}")
    if "universal" in parts and config.universal_layers < 1:
        raise UserError("part 'universal' needs config.model.universal_layers >= 1")
    if "temporal" not in parts and config.temporal_downsampling:
        raise UserError("config.model.temporal_downsampling needs the part 'temporal'")
