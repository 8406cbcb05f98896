"""A batch job: a prompt a line in, a JSON object a line out, in the order of the prompts.

python examples/batch_job.py prompts.txt results.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import fastgen

AT_A_TIME = 256  # prompts: what has been done is on disk, and memory stays the same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--model", help="folder or hub id (default: the bundled model)")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    arguments = parser.parse_args()
    prompts = arguments.prompts.read_text(encoding="utf-8").splitlines()
    params = fastgen.SamplingParams(temperature=0, max_new_tokens=arguments.max_new_tokens)
    with fastgen.load(arguments.model) as model, arguments.results.open("w") as results:
        for start in range(0, len(prompts), AT_A_TIME):
            some = prompts[start : start + AT_A_TIME]
            for prompt, generation in zip(some, model.generate(some, params), strict=True):
                record = {"prompt": prompt, "text": generation.text}
                results.write(json.dumps(record, ensure_ascii=False) + "\n")
    print(f"{len(prompts)} prompts, results in {arguments.results}")


if __name__ == "__main__":
    main()
