"""mPLUG-2 in JAX: a training stack for a modular foundation model over text, image and video.

Axis letters used in names, comments and jaxtyping signatures, everywhere:

=====  ==============================================================
``b``  batch (examples); ``g`` groups of the batch
``t``  frames; ``n`` patches per frame (``n+1`` with the class token)
``s``  visual sequence, ``1 + t*n``; also the keys of any attention
``l``  text length; also the queries of any attention
``m``  target length
``d``  model width; ``w`` vision width; ``f`` hidden width of an MLP
``h``  heads; ``k`` width of a head
``q``  latent queries
``v``  vocabulary
``r``  sequences per memory (answers per question, beams per clip)
=====  ==============================================================
"""

__version__ = "0.1.0"
