"""Lists that share out clips: every label in its share, what belongs together in one list.

The greedy iterative stratification of Sechidis, Tsoumakas and Vlahavas (On the Stratification of Multi-Label Data, ECML
PKDD 2011), with whole groups of clips in place of single ones. The label with the fewest groups left is shared out
first, its largest groups before small ones. A group goes to the list where it lowers most the chi-square distance
between the labels that the lists have and those that they should have. As long as a label has no more groups left than
there are lists without it, its groups go to these.

N clips, L lists.
"""

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

# Bounds of the refinement, which keep it to seconds: groups, groups times labels, and these times groups for pairs.
_MOST_GROUPS, _MOST_CELLS, _MOST_COMPARED = 10_000, 5_000_000, 20_000_000
_MOST_PASSES = 5
_LEAST_GAIN = 1e-6


def compute_order(names: Sequence[str], seed: int) -> np.ndarray:
    """Return a number for each name that depends on it and the seed alone, uint64 (N,)."""
    prefix = f"{seed}\0".encode()
    digests = [hashlib.blake2b(prefix + name.encode("utf-8"), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def stratify(
    labels: Sequence[str],
    groups: np.ndarray,
    shares: Sequence[float],
    order: np.ndarray,
    *,
    first_has_all: bool = False,
) -> np.ndarray:
    """Share groups of clips out to lists, so that each label has its share in each as far as groups allow.

    Args:
        labels: of each clip, joined by ";"; "" for none.
        groups: of each clip, int (N,), from 0.
        shares: of the L lists; they sum to 1.
        order: of each clip, (N,): breaks ties between equal groups, see `compute_order`.
        first_has_all: a label with fewer groups than lists is in the first list (train) in any case.

    Returns:
        The list of each clip, int64 (N,).
    """
    contents, rank = _weigh_groups(labels, groups, order)
    lists = _Lists(contents, np.asarray(shares, dtype=float), first_has_all)
    groups_of: list[list[int]] = [[] for _ in range(lists.n_labels)]
    for group, content in enumerate(contents):
        for label, _ in content:
            groups_of[label].append(group)
    # The last label is that of all clips: what is left when labels are done has no label.
    heap = [(len(groups_of[label]), label) for label in range(lists.n_labels - 1)]
    heapq.heapify(heap)
    with tqdm(total=len(contents), desc="sharing out", unit=" groups", delay=2, disable=None) as progress:
        while heap:
            n_left, label = heapq.heappop(heap)
            if n_left == lists.n_left[label]:  # else it was counted anew below
                changed = lists.share_out(label, groups_of[label])
                progress.update(n_left)
                for other in changed:
                    if lists.n_left[other]:
                        heapq.heappush(heap, (lists.n_left[other], other))
    lists.share_out(lists.n_labels - 1, groups_of[-1])
    if len(contents) < len(labels):
        _refine(lists, np.asarray(shares, dtype=float))
    return np.array(lists.list_of, dtype=np.int64)[rank[groups]]


_Content = tuple[tuple[int, int], ...]  # label and number of clips, for each label of a group


def _weigh_groups(labels: Sequence[str], groups: np.ndarray, order: np.ndarray) -> tuple[list[_Content], np.ndarray]:
    """Return the contents of groups from large to small, equal ones in their random order, and each group's rank."""
    n_groups = int(groups.max()) + 1
    parts = {cell: [part for part in cell.split(";") if part] for cell in set(labels)}
    names = sorted({part for cell in parts.values() for part in cell})
    code = {name: number for number, name in enumerate(names)}
    codes = {cell: sorted({code[part] for part in cell_parts}) for cell, cell_parts in parts.items()}
    everything = len(names)
    # Groups of one clip share their content with all others of the same labels.
    single = {cell: (*((label, 1) for label in cell_codes), (everything, 1)) for cell, cell_codes in codes.items()}
    sizes = np.bincount(groups, minlength=n_groups)
    first_order = np.full(n_groups, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(first_order, groups, order.astype(np.uint64))
    contents: list[_Content] = [()] * n_groups
    counts: dict[int, Counter[int]] = {}
    for group, cell in zip(groups.tolist(), labels, strict=True):
        if sizes[group] == 1:
            contents[group] = single[cell]
        else:
            counts.setdefault(group, Counter()).update((*codes[cell], everything))
    for group, counted in counts.items():
        contents[group] = tuple(sorted(counted.items()))
    ranked = np.lexsort((first_order, -sizes))
    return [contents[group] for group in ranked.tolist()], np.argsort(ranked)


class _Lists:
    """What the lists have and lack while groups are shared out.

    Attributes:
        n_labels: with one more, the last, that every clip has.
        n_left: groups of each label without a list.
        list_of: of each group, -1 before it has one.
    """

    def __init__(self, contents: Sequence[_Content], shares: np.ndarray, first_has_all: bool) -> None:
        self.contents = contents
        self.n_lists = len(shares)
        self.first_has_all = first_has_all
        self.n_labels = 1 + max(content[-1][0] for content in contents)
        self.list_of = [-1] * len(contents)
        self.n_left = [0] * self.n_labels
        n_clips = [0] * self.n_labels
        for content in contents:
            for label, count in content:
                self.n_left[label] += 1
                n_clips[label] += count
        self.lacking = [set(range(self.n_lists)) for _ in n_clips]
        # Of each label, a list of L numbers.
        self.missing = [(n * shares).tolist() for n in n_clips]  # clips that the lists still lack
        self.weight = [(1 / (n * shares)).tolist() for n in n_clips]
        # How much one more clip lowers (expected - has)^2 / expected, relative to the label's clips.
        self.gain = [
            [(2 * w - 1) * k for w, k in zip(*row, strict=True)] for row in zip(self.missing, self.weight, strict=True)
        ]

    def share_out(self, label: int, groups: Sequence[int]) -> set[int]:
        """Give a list to each group of a label that has none; return the labels that these groups have, too."""
        changed: set[int] = set()
        for group in groups:
            if self.list_of[group] < 0:
                content = self.contents[group]
                chosen = self._choose(content, label)
                self.list_of[group] = chosen
                for other, count in content:
                    self.n_left[other] -= 1
                    self.missing[other][chosen] -= count
                    self.gain[other][chosen] = (2 * self.missing[other][chosen] - 1) * self.weight[other][chosen]
                    self.lacking[other].discard(chosen)
                    changed.add(other)
        return changed - {label, self.n_labels - 1}

    def _choose(self, content: _Content, label: int) -> int:
        """Return the list in which the group lowers chi-square most, of those that the label allows."""
        if content[-1][1] == 1:
            gains = list(map(math.fsum, zip(*[self.gain[other] for other, _ in content], strict=True)))
        else:
            gains = [0.0] * self.n_lists
            for other, count in content:
                for number, (gain, weight) in enumerate(zip(self.gain[other], self.weight[other], strict=True)):
                    gains[number] += count * (gain - (count - 1) * weight)
        lacking, n_left = self.lacking[label], self.n_left[label]
        if n_left > len(lacking):
            return gains.index(max(gains))
        if self.first_has_all and n_left == 1 and 0 in lacking:
            return 0
        return max(sorted(lacking), key=gains.__getitem__)


def _refine(lists: _Lists, shares: np.ndarray) -> None:
    """Move groups to other lists, or exchange two, as long as that lowers chi-square.

    With few groups (30 speakers), the greedy choice leaves much to gain; with many, next to nothing. A label that could
    be in every list and is not counts as much as all that it could be off otherwise.
    """
    n_groups, n_lists = len(lists.contents), lists.n_lists
    n_cells = n_groups * lists.n_labels
    if n_groups > _MOST_GROUPS or n_cells > _MOST_CELLS:
        return
    counts = np.zeros((n_groups, lists.n_labels))
    for group, content in enumerate(lists.contents):
        for label, count in content:
            counts[group, label] = count
    list_of = np.array(lists.list_of)
    totals = counts.sum(axis=0)
    expected = shares[:, None] * totals  # (L, labels)
    weight = 1 / (expected * totals)
    needed = np.repeat((counts > 0).sum(axis=0)[None] >= n_lists, n_lists, axis=0)
    needed[0] |= lists.first_has_all
    has = np.stack([counts[list_of == number].sum(axis=0) for number in range(n_lists)])

    def cost(number: int | np.ndarray, of: np.ndarray) -> np.ndarray:
        """Chi-square of list `number` if it has `of` clips, summed over labels."""
        return ((of - expected[number]) ** 2 * weight[number] + ((of == 0) & needed[number])).sum(axis=-1)

    every = np.arange(n_lists)
    exchange = n_groups * n_cells <= _MOST_COMPARED
    for _ in range(_MOST_PASSES):
        n_changed = 0
        for group in range(n_groups):
            current, content = list_of[group], counts[group]
            now = cost(every, has)
            moved = cost(current, has[current] - content) + cost(every, has + content) - now[current] - now
            moved[current] = 0
            exchanged = np.zeros(n_groups)
            if exchange:
                more = counts - content
                exchanged = (
                    cost(current, has[current] + more)
                    + cost(list_of, has[list_of] - more)
                    - now[current]
                    - now[list_of]
                )
                exchanged[list_of == current] = 0
            # Rounded, so that the last bits of a sum decide nothing.
            best_move, best_exchange = np.round(moved, 9).argmin(), np.round(exchanged, 9).argmin()
            if min(moved[best_move], exchanged[best_exchange]) > -_LEAST_GAIN:
                continue
            if moved[best_move] <= exchanged[best_exchange]:
                to, change = best_move, content
            else:
                to, change = list_of[best_exchange], content - counts[best_exchange]
                list_of[best_exchange] = current
            list_of[group] = to
            has[current] -= change
            has[to] += change
            n_changed += 1
        if not n_changed:
            break
    lists.list_of = list_of.tolist()
