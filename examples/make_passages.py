"""Makes examples/data/passages.csv, a small task of real text: who speaks in this passage?

    python examples/make_passages.py --text state_of_the_union.txt.xz moby_dick.txt.xz --out examples/data/passages.csv

The texts are those of train_demo.py: the State of the Union addresses in order of time, from 1790 to 2018, and
Moby-Dick. Labels: an address of 1790-1900, an address from 1934 on, the novel. A passage is 200 to 400 characters of
whole sentences. Every fifth address and chapter is for the test, and gives no passage to the training. The same texts
give the same file, byte for byte.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from demo_text import Document, read_documents

OLD, MODERN, NOVEL = "old address", "modern address", "novel"
OLD_END, MODERN_BEGIN = 111, 143  # the addresses before the one of 1901, and from the one of January 1934 on
SHORTEST, LONGEST = 200, 400  # characters
TEST_EVERY = 5


def name_label(document: Document, index: int) -> str | None:
    """The label of the address or chapter with this index among its kind; None for the addresses in between."""
    if document.voice == "sea":
        return NOVEL
    return OLD if index < OLD_END else MODERN if index >= MODERN_BEGIN else None


def cut(document: Document) -> Iterator[str]:
    """The document in passages of whole sentences, one after the other; sentences that are too long are left out."""
    begin, starts = 0, document.starts
    for i in range(1, len(starts)):
        passage = " ".join(document.text[starts[begin] : starts[i]].split())
        if len(passage) >= SHORTEST:
            if len(passage) <= LONGEST:
                yield passage
            begin = i


def draw(documents: Sequence[tuple[str, Document]], count: int, rng: random.Random) -> list[tuple[str, str]]:
    """(source, passage), taken from each document in turn, so that a long one does not outweigh the others."""
    passages = []
    for source, document in documents:
        found = list(cut(document))
        passages.append([(source, passage) for passage in rng.sample(found, len(found))])
    rng.shuffle(passages)
    turns = [each for turn in itertools.zip_longest(*passages) for each in turn if each is not None]
    if len(turns) < count:
        raise SystemExit(f"--text gives {len(turns)} passages; expected {count}; give longer texts, or ask for fewer")
    return turns[:count]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="text, .xz, or folders of JSON files")
    parser.add_argument("--out", type=Path, required=True, help="the CSV: split,label,source,text")
    parser.add_argument("--train", type=int, default=200, help="passages of a label (default: 200)")
    parser.add_argument("--test", type=int, default=100, help="passages of a label (default: 100)")
    args = parser.parse_args(argv)

    groups: dict[tuple[str, str], list[tuple[str, Document]]] = {
        (split, label): [] for split in ("train", "test") for label in (OLD, MODERN, NOVEL)
    }
    seen = {"president": 0, "sea": 0}
    for document in (document for path in args.text for document in read_documents(path)):
        index = seen[document.voice]
        seen[document.voice] += 1
        if label := name_label(document, index):
            source = f"{'chapter' if label == NOVEL else 'address'} {index + 1}"
            groups["train" if (index + 1) % TEST_EVERY else "test", label].append((source, document))

    rng, rows = random.Random(0), []
    for (split, label), documents in groups.items():
        count = args.train if split == "train" else args.test
        rows += [(split, label, source, text) for source, text in draw(documents, count, rng)]
    rng.shuffle(rows)
    with args.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("split", "label", "source", "text"))
        writer.writerows(rows)
    print(f"{args.out}: {len(rows)} passages, {args.out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
