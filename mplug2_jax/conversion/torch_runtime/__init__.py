"""A PyTorch runtime for weights in the official layout: our model as plain PyTorch modules.

It needs PyTorch and safetensors, but not JAX. Attribute names are the release's, so its checkpoints and our exports
load strictly; ignored tensors are dropped by rule and listed. Exported folders have copies of these files under another
name, so imports are relative. Read ``model.py`` first.

Example::

    model = Caption.from_pretrained("exports/msrvtt-caption")
    output = model.generate(normalize_pixels(frames))
"""

from .config import SIZES, Config, read_config
from .layers import Taps
from .model import Caption, VideoQA, parameter_groups, update_teacher
from .search import DecodeOutput, SearchConfig
from .vision import normalize_pixels

__all__ = [
    "SIZES", "Caption", "Config", "DecodeOutput", "SearchConfig", "Taps", "VideoQA", "normalize_pixels",
    "parameter_groups", "read_config", "update_teacher",
]  # fmt: skip
