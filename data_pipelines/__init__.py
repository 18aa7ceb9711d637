"""From files and generators to batches: sources, decoding, transforms, tokenizers, loaders. Independent of models."""
