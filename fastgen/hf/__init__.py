"""The drop-in for transformers: GPT2LMHeadModel and accelerate(). Each row of a `generate` call is
a request of the engine; what fastgen cannot do exactly is left to transformers' own code. It needs
torch and transformers. It imports the engine and the rooms below it; nothing imports it but
fastgen's front door.
"""
