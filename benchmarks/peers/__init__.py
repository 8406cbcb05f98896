"""Peer engines, each a module that worker.py runs in a process of its own."""
