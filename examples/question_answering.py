"""Questions answered by a few-shot prompt: a text, examples of questions and answers, a question.

    python examples/question_answering.py "Who went up into the mountain?"

The text and the examples are computed once: all questions share their blocks in the KV cache.
"""

from __future__ import annotations

import argparse

import fastgen

TEXT = (
    "And Moses went up into the mount, and a cloud covered the mount. And the glory of the LORD "
    "abode upon mount Sinai, and the cloud covered it six days."
)
EXAMPLES = (
    ("What covered the mount?", "a cloud"),
    ("How long did the cloud cover it?", "six days"),
)


def answers(
    model: fastgen.Generator, questions: list[str], text: str = TEXT
) -> list[tuple[str, float]]:
    """For each question the answer, and the mean log-probability of its tokens."""
    shots = "".join(f"Q: {question}\nA: {answer}\n" for question, answer in EXAMPLES)
    prompts = [f"{text}\n\n{shots}Q: {question}\nA:" for question in questions]
    found = []
    for generation in model.generate(
        prompts, temperature=0, max_new_tokens=20, stop="\n", logprobs=0
    ):
        completion = generation.completions[0]
        logprobs = [token.logprob for token in completion.logprobs or ()]
        found.append((completion.text.strip(), sum(logprobs) / max(1, len(logprobs))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--model", help="folder or hub id (default: the bundled model)")
    arguments = parser.parse_args()
    with fastgen.load(arguments.model) as model:
        found = answers(model, arguments.questions)
    for question, (answer, confidence) in zip(arguments.questions, found, strict=True):
        print(f"{question} {answer} ({confidence:.2f} nats a token)")


if __name__ == "__main__":
    main()
