"""Token ids in, token ids out. Requests and their rows, the queue, the scheduler, the KV blocks,
and the one step loop that every caller shares. It imports decoders and sampling, and the protocol
through which text leaves a row; it knows no tokenizer. Frontends and the drop-in import it.
"""
