"""From files and generators to batches: sources, decoding, transforms, tokenisers, loaders. Knows no model."""
