"""What a draw is. The options of a request (options, the table that declares each once, and params,
its fields), what changes its logits (processors), what may be drawn (filters), the uniform number
(philox) and the definition of a draw in NumPy (definition); and two implementations of it for all
rows of a step: C++ (native_sampler) and PyTorch (torch_sampler). The third, in Triton, stands with
the CUDA decoder. It imports only the shared words; decoders, the engine and everything above import
it.
"""
