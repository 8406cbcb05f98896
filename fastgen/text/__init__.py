"""Text to token ids (tokenizer), and ids to text as they come, with stop strings (detokenizer). It
imports the shared words and checkpoints, for their file checks; frontends and the server import
it, and the engine knows its Sink protocol, through which text leaves a row.
"""
