"""A StepBatch in, logits or draws out. `interface` says what a decoder is, `select` which one a
model gets, `plan` and `memory` how it is set up; cpu/ (C++), cuda/ (Triton) and torch/ (PyTorch)
are the three. It imports sampling, checkpoints and the kernels; only the engine steps a decoder,
and whoever loads a model selects one.
"""
