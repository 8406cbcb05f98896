"""Text in, text out: what a program calls. Generator, and AsyncEngine and ThreadedEngine on an
engine thread; between them and the engine the codec of a request, its stream, ranking and scoring.
It imports all rooms below; the server, the benchmark and the command line import it.
"""
