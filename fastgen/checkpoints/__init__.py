"""Files to checked tensors. config.json as data (config), the files of a folder, opened without
trusting them (files), a folder or hub id (checkpoint) or a transformers model (in_memory) as
tensors by name. It imports only the shared words; the tokenizer, decoders and everything above
import it.
"""
