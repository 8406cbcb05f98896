"""An HTTP server that speaks OpenAI's completions protocol (docs/serving.md). It imports frontends
and the words of the rooms below; nothing imports it but the command line. Its packages (starlette,
uvicorn, prometheus_client) are an extra.
"""
