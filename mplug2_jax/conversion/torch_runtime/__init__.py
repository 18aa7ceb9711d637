"""A PyTorch runtime for weights in the official layout: our model as plain PyTorch modules.

It needs PyTorch and safetensors, but not JAX. Attribute names are the release's, so its checkpoints and our exports
load strictly; ignored tensors are dropped by rule and listed. Read ``model.py`` first.

Example::

    model = Caption.from_pretrained("exports/msrvtt-caption")
    output = model.generate(normalize_pixels(frames))
"""

from mplug2_jax.conversion.torch_runtime.config import SIZES, Config, read_config
from mplug2_jax.conversion.torch_runtime.layers import Taps
from mplug2_jax.conversion.torch_runtime.model import Caption, VideoQA, parameter_groups, update_teacher
from mplug2_jax.conversion.torch_runtime.search import DecodeOutput, SearchConfig
from mplug2_jax.conversion.torch_runtime.vision import normalize_pixels

__all__ = [
    "SIZES", "Caption", "Config", "DecodeOutput", "SearchConfig", "Taps", "VideoQA", "normalize_pixels",
    "parameter_groups", "read_config", "update_teacher",
]  # fmt: skip
