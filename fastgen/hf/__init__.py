"""The drop-in for transformers: GPT2LMHeadModel on fastgen's decoder. It needs torch and
transformers."""
