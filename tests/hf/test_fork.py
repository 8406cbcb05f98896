"""The drop-in in forked children. frontends/test_fork.py has the engine's."""

from __future__ import annotations

import os

import pytest

from fastgen.frontends.generator import BUNDLED_MODEL
from fastgen.native import native
from tiny_checkpoints import run_python

pytestmark = [
    pytest.mark.skipif(native is None, reason="the torch decoder does not survive a fork"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
]

_DROP_IN = """
import os, sys, threading
import fastgen, torch
torch.set_num_threads(1)  # PyTorch's own threads are not in a child
model = fastgen.GPT2LMHeadModel.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor([[1, 2, 3]])
def told(count=10):
    return model.generate(ids, do_sample=False, max_new_tokens=count, pad_token_id=0)[0].tolist()
wanted, stop, called = told(), threading.Event(), threading.Event()
def work():
    while not stop.is_set():
        model(ids)
        told(5)
        called.set()
threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(8):
    called.clear()
    called.wait()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if told() == wanted else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
stop.set()
for thread in threads:
    thread.join()
"""


def test_the_drop_in_while_other_threads_use_it() -> None:
    run_python(_DROP_IN, BUNDLED_MODEL)
