"""The drop-in for transformers: GPT2LMHeadModel on fastgen's decoder. Needs torch and transformers."""
