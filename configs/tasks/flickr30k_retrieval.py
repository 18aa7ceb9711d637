"""Flickr30k retrieval, Karpathy's splits: 29,000 pictures to learn from, 1,000 and their 5,000 captions to be found.

Data: flickr30k/dataset_flickr30k.json (https://cs.stanford.edu/people/karpathy/deepimagesent); the pictures in
flickr30k/images (https://shannon.cs.illinois.edu/DenotationGraph).
"""

from ml_collections import ConfigDict

from mplug2_jax.recipes.base import Sets, files
from mplug2_jax.recipes.retrieval import retrieval


def get_config(size: str = "large") -> ConfigDict:
    """The run, at one of the sizes of the model."""
    file, media = "flickr30k/dataset_flickr30k.json", "flickr30k/images"
    test = files("image", file, media, format="karpathy", split="test", expand="text")
    sets = Sets(
        train=files("image", file, media, format="karpathy", split="train"), examples=29_000, asked={"test": test}
    )
    return retrieval("flickr30k_retrieval", size, sets)
