"""The optimizer: AdamW, schedules, layer-wise decay, LoRA, frozen parts."""
