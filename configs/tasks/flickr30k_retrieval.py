"""Flickr30k retrieval, Karpathy's splits: 29,000 training images, 1,000 test images and their 5,000 captions.

Data: flickr30k/dataset_flickr30k.json (https://cs.stanford.edu/people/karpathy/deepimagesent); the images in
flickr30k/images (https://shannon.cs.illinois.edu/DenotationGraph).
"""

from mplug2_jax.recipes.api import RunConfig, TaskData, file_source, retrieval_recipe


def get_config(size: str = "large") -> RunConfig:
    """Return the run at a model size."""
    file, media = "flickr30k/dataset_flickr30k.json", "flickr30k/images"
    test = file_source("image", file, media, format="karpathy", split="test", expand="text")
    data = TaskData(
        train=file_source("image", file, media, format="karpathy", split="train"), num_train=29_000, eval={"test": test}
    )
    return retrieval_recipe("flickr30k_retrieval", size, data)
