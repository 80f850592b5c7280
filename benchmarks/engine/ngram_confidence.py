"""How often prompt lookup is right, by the length of the match: the table in `drafters/ngram.py`.

    python benchmarks/engine/ngram_confidence.py --generations FILE.jsonl

Each line: {"prompt": [token ids], "answer": [token ids]}, plain generations of the served model. For every position of
an answer the longest, then most recent, earlier occurrence of the text's end is looked up with the product's own
`match_lengths`, and what followed it is compared with what came.
"""

import argparse
import json
from pathlib import Path

import torch

from gorgon_engine.drafters.ngram import MATCH_CLASSES, match_lengths

DEPTH = 12
MAX_MATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rights = torch.zeros(len(MATCH_CLASSES), 2)
    tries = torch.zeros(len(MATCH_CLASSES), 2)
    for line in arguments.generations.read_text().splitlines():
        entry = json.loads(line)
        text = torch.tensor(entry["prompt"] + entry["answer"])
        for end in range(len(entry["prompt"]) + 1, len(text)):
            count_position(text, end, rights, tries)
    print("match  first draft right  later draft right (those before it right)")
    for row, length in enumerate(MATCH_CLASSES):
        shares = (rights[row] / tries[row].clamp(min=1)).tolist()
        print(f"{length:5}  {shares[0]:.2f} of {int(tries[row, 0]):6}     {shares[1]:.2f} of {int(tries[row, 1]):6}")


def count_position(text: torch.Tensor, end: int, rights: torch.Tensor, tries: torch.Tensor) -> None:
    """Add the lookup behind text[:end] to the counts [classes, 2] (first draft, later drafts)."""
    history = text[None, :end]
    matched = match_lengths(history, torch.tensor([end]), MAX_MATCH)[0]
    best = int((matched * end + torch.arange(end)).argmax())
    length = int(matched[best])
    if not length:
        return
    row = sum(length >= bound for bound in MATCH_CLASSES) - 1
    for depth in range(DEPTH):
        if best + 1 + depth >= end or end + depth >= len(text):
            return
        column = min(depth, 1)
        right = bool(text[best + 1 + depth] == text[end + depth])
        tries[row, column] += 1
        rights[row, column] += right
        if not right:
            return


if __name__ == "__main__":
    main()
