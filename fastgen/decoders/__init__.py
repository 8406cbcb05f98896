"""Decoders: StepBatch in, logits or draws out. `interface` defines them, `choice` picks one."""
