"""An HTTP server that speaks OpenAI's completions protocol (docs/serving.md). It imports
frontends, and of the rooms below the options, the tokenizer and the limits of requests; nothing
imports it but the command line. Its packages (starlette, uvicorn, prometheus_client) are an extra.
"""
