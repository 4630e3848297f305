"""Near-duplicates: prompts that differ in a few characters, within a split and between splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from instruct_lm.data.conversation import Conversation
from instruct_lm.data.dataset import Splits
from instruct_lm.errors import InputError, listing

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

MOST_PAIRS = 1_000_000
"""`near_duplicates` refuses to return more."""

_ROUNDING = 1e-9
_ROWS = 256  # texts that are compared with all others at a time; this and _CANDIDATES bound the memory
_CANDIDATES = 4096


class Pair(NamedTuple):
    """Two texts by their positions, `first` < `second`, and their similarity in [0, 1]."""

    first: int
    second: int
    similarity: float


def near_duplicates(texts: Sequence[str], threshold: float, parts: Sequence[str] | None = None) -> list[Pair]:
    """Pairs of texts of at least a similarity, the most similar first.

    The similarity is the cosine of the texts' TF-IDF vectors over character trigrams, which hold for texts without
    spaces too: a trigram's count times ln((1 + n) / (1 + df)) + 1, where df of the n distinct texts have the trigram
    (scikit-learn's `TfidfVectorizer`, as in the book's `find-near-duplicates.py`). The other texts thus have a small
    part in it. Case and whitespace do not matter; texts that are equal but for them have similarity 1.

    Equal texts pair with other texts by their first one only: k equal texts give k - 1 pairs, not k (k - 1) / 2.

    Args:
        texts: n texts.
        threshold: Least similarity, in (0, 1]; 1: equal texts, and texts with the same trigrams.
        parts: (n) a name for each text, such as its split: equal texts then have a first one in each part.

    Raises:
        InputError: The threshold is outside (0, 1], or more than `MOST_PAIRS` pairs reach it.

    Example:
        >>> near_duplicates(["What is the capital of Italy?", "Name a fruit.", "what is  the capital of italy?"], 0.9)
        [Pair(first=0, second=2, similarity=1.0)]
    """
    _check(threshold)
    groups: dict[str, dict[str, list[int]]] = {}  # text → part → positions
    for position, text in enumerate(texts):
        groups.setdefault(_folded(text), {}).setdefault(parts[position] if parts else "", []).append(position)
    firsts = [[positions[0] for positions in group.values()] for group in groups.values()]
    pairs = [Pair(a, b, 1.0) for group in firsts for a, b in combinations(group, 2)]
    pairs += [Pair(a, b, 1.0) for group in groups.values() for a, *others in group.values() for b in others]
    for i, j, similarity in _similar(list(groups), range(len(groups)), threshold, wanted=np.less):
        pairs += [Pair(min(a, b), max(a, b), similarity) for a in firsts[i] for b in firsts[j]]
        if len(pairs) > MOST_PAIRS:
            raise InputError(
                f"More than {MOST_PAIRS:,} pairs of texts are at least {threshold:g} alike. Use a higher threshold."
            )
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair))


def questions(conversations: Sequence[Conversation]) -> list[str]:
    """What is compared of each conversation: all turns but the last, which is the answer.

    A test question that was trained on is a leak, whatever the answers. A system turn that more than half of the
    conversations have in common is left out: it would make all of them alike.
    """
    turns = [(turn.role, turn.text) for conversation in conversations for turn in conversation.prompt]
    systems = Counter(text for role, text in turns if role == "system")
    common = {text for text, count in systems.items() if 2 * count > len(conversations)}
    return [
        "\n".join(
            text
            for turn in conversation.prompt
            if not (turn.role == "system" and turn.text in common)
            for text in (turn.text, turn.input)
            if text
        )
        for conversation in conversations
    ]


class Removed(NamedTuple):
    """A training entry that was removed, a test or validation entry that it is near to, and their similarity."""

    entry: Conversation
    like: Conversation
    similarity: float


def without_near_duplicates(splits: Splits, threshold: float) -> tuple[Splits, list[Removed]]:
    """Remove the entries of the training split that are too near to a test or validation entry.

    Args:
        splits: The entries, of which `questions` are compared.
        threshold: Least similarity, in (0, 1], as for `near_duplicates`.

    Returns:
        The splits with fewer training entries, and what was removed, in the order of the split.

    Raises:
        InputError: The threshold is outside (0, 1], or no training entry is left.
    """
    _check(threshold)
    n, held_out = len(splits.train), [*splits.test, *splits.validation]
    texts = [_folded(text) for text in questions([*splits.train, *held_out])]
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    near: dict[int, tuple[int, float]] = {}  # row of a text → a position in held_out, similarity
    for i, text in enumerate(texts[n:]):
        near.setdefault(rows[text], (i, 1.0))
    new = np.ones(len(rows), dtype=bool)
    new[list(near)] = False
    for row, other, similarity in _similar(list(rows), sorted(near), threshold, wanted=lambda _, others: new[others]):
        near.setdefault(other, (near[row][0], similarity))
        new[other] = False
    kept, removed = [], []
    for entry, text in zip(splits.train, texts[:n], strict=True):
        if rows[text] in near:
            i, similarity = near[rows[text]]
            removed.append(Removed(entry, held_out[i], similarity))
        else:
            kept.append(entry)
    if not kept:
        raise InputError(
            f"data.deduplicate={threshold:g} leaves no training entry: all {n} are that near to a test or validation "
            "entry. Use a higher value, or null."
        )
    return splits._replace(train=kept), removed


def removed_message(removed: Sequence[Removed], threshold: float) -> str:
    """How many training entries were removed, and the first ones by their numbers in the file."""
    found = [f"{entry.number} (like {like.number}: {similarity:.3f})" for entry, like, similarity in removed]
    return (
        f"data.deduplicate={threshold:g}: {len(removed)} training entries removed that are near to a test or "
        f"validation entry{': entry ' if found else ''}{', '.join(listing(found))}"
    )


def _check(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise InputError(f"The similarity threshold {threshold:g} is outside (0, 1]. Use 0.9, or 1 for equal texts.")


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _similar(
    texts: Sequence[str],
    queries: Sequence[int],
    threshold: float,
    wanted: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Iterator[tuple[int, int, float]]:
    """Positions of a query and of another text, and their similarity; `wanted` says which pairs to look at.

    The texts are distinct and folded. `wanted` is asked while the pairs are found, so what it says may change.
    """
    if not any(len(text) >= 3 for text in texts):
        return  # no trigrams
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(analyzer="char", ngram_range=(3, 3), lowercase=False).fit_transform(texts)
    heads, rests = _heads(vectors, 0.9 * threshold)
    heads_of_all = heads.T.tocsr()
    for start in range(0, len(queries), _ROWS):
        rows = np.asarray(queries[start : start + _ROWS])
        shared = (heads[rows] @ heads_of_all).tocoo()
        left, right = rows[shared.row], shared.col
        possible = (shared.data + np.maximum(rests[left], rests[right]) >= threshold - _ROUNDING) & wanted(left, right)
        left, right = left[possible], right[possible]
        for i in range(0, len(left), _CANDIDATES):
            a, b = left[i : i + _CANDIDATES], right[i : i + _CANDIDATES]
            still = wanted(a, b)
            a, b = a[still], b[still]
            cosines = np.asarray(vectors[a].multiply(vectors[b]).sum(axis=1)).ravel()
            enough = cosines >= threshold - _ROUNDING
            yield from zip(a[enough].tolist(), b[enough].tolist(), cosines[enough].clip(max=1).tolist(), strict=True)


def _heads(vectors: csr_matrix, most: float) -> tuple[csr_matrix, np.ndarray]:
    """Each vector without its commonest trigrams, as many as have a norm below `most`; and (n) the norms left out.

    The prefix filter of Bayardo et al., "Scaling up all pairs similarity search" (2007): x · y is at most the product
    of the heads plus the greater norm left out, since what one of the two leaves out is all that the product misses.
    So most pairs, those that share common trigrams alone, are never looked at.
    """
    commonness = np.bincount(vectors.indices, minlength=vectors.shape[1])
    order = np.argsort(commonness, kind="stable")
    ordered = vectors[:, order]
    ordered.sort_indices()  # the rarest trigrams first
    sums = np.append(0.0, np.cumsum(ordered.data**2))
    to_the_end = (
        np.repeat(sums[ordered.indptr[1:]], np.diff(ordered.indptr)) - sums[:-1]
    )  # squared norm to the row's end
    ordered.data[to_the_end < most**2] = 0
    ordered.eliminate_zeros()
    return ordered, np.sqrt(np.maximum(0.0, 1.0 - np.asarray(ordered.multiply(ordered).sum(axis=1)).ravel()))
