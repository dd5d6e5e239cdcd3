"""Stratified splits of clips with several labels, in which groups of clips stay together.

The greedy iterative stratification of Sechidis, Tsoumakas and Vlahavas (On the Stratification of Multi-Label Data, ECML
PKDD 2011), with groups of clips in place of single clips. The label with the fewest unassigned groups is processed
first, its large groups before small ones. A group is assigned to the list where it reduces the chi-square distance
between the actual and the expected number of clips of each label most. If a label has no more unassigned groups than
there are lists without it, only these lists are considered.

N clips, L lists.
"""

import heapq
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

# Limits of the refinement, which bound it to seconds: groups, groups times labels, and these times groups for pairs.
_MAX_GROUPS, _MAX_CELLS, _MAX_COMPARED = 10_000, 5_000_000, 20_000_000
_MAX_PASSES = 5
_MIN_GAIN = 1e-6


def stratify(
    labels: Sequence[str],
    groups: np.ndarray,
    shares: Sequence[float],
    order: np.ndarray,
    *,
    first_has_all: bool = False,
) -> np.ndarray:
    """Assign groups of clips to lists, so that the labels of each list are in proportion as far as groups allow.

    Args:
        labels: of each clip, joined by ";"; "" for none.
        groups: of each clip, int (N,), from 0.
        shares: of the L lists, with sum 1.
        order: of each clip, (N,), by which ties are resolved: see `audio.selection.compute_order`.
        first_has_all: the first list (train) gets a group of every label.

    Returns:
        The list of each clip, int64 (N,).
    """
    contents, rank = _count_labels(labels, groups, order)
    lists = _Assignment(contents, np.asarray(shares, dtype=float), first_has_all)
    groups_of: list[list[int]] = [[] for _ in range(lists.n_labels)]
    for group, content in enumerate(contents):
        for label, _ in content:
            groups_of[label].append(group)
    # The last label is that of all clips; by it, groups without labels are assigned in the end.
    heap = [(len(groups_of[label]), label) for label in range(lists.n_labels - 1)]
    heapq.heapify(heap)
    with tqdm(total=len(contents), desc="splitting", unit=" groups", delay=2, disable=None) as progress:
        while heap:
            n_groups, label = heapq.heappop(heap)
            if n_groups == lists.n_groups[label]:  # else a newer entry of the label is in the heap
                changed = lists.assign(label, groups_of[label])
                progress.update(n_groups)
                for other in changed:
                    if lists.n_groups[other]:
                        heapq.heappush(heap, (lists.n_groups[other], other))
    lists.assign(lists.n_labels - 1, groups_of[-1])
    if len(contents) < len(labels):
        _refine(lists, np.asarray(shares, dtype=float))
    return np.array(lists.list_of, dtype=np.int64)[rank[groups]]


_Content = tuple[tuple[int, int], ...]  # label and number of clips, for each label of a group


def _count_labels(labels: Sequence[str], groups: np.ndarray, order: np.ndarray) -> tuple[list[_Content], np.ndarray]:
    """Return the contents of groups, from large to small and by `order` among equal ones, and each group's rank."""
    n_groups = int(groups.max()) + 1
    parts = {cell: [part for part in cell.split(";") if part] for cell in set(labels)}
    names = sorted({part for cell in parts.values() for part in cell})
    code = {name: number for number, name in enumerate(names)}
    codes = {cell: sorted({code[part] for part in cell_parts}) for cell, cell_parts in parts.items()}
    all_clips = len(names)  # the label of all clips
    # Single clips of the same labels share one tuple, which saves memory.
    single = {cell: (*((label, 1) for label in cell_codes), (all_clips, 1)) for cell, cell_codes in codes.items()}
    sizes = np.bincount(groups, minlength=n_groups)
    first_order = np.full(n_groups, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(first_order, groups, order.astype(np.uint64))
    contents: list[_Content] = [()] * n_groups
    counts: dict[int, Counter[int]] = {}
    for group, cell in zip(groups.tolist(), labels, strict=True):
        if sizes[group] == 1:
            contents[group] = single[cell]
        else:
            counts.setdefault(group, Counter()).update((*codes[cell], all_clips))
    for group, counted in counts.items():
        contents[group] = tuple(sorted(counted.items()))
    ranked = np.lexsort((first_order, -sizes))
    return [contents[group] for group in ranked.tolist()], np.argsort(ranked)


class _Assignment:
    """The state of the assignment of groups to lists.

    Attributes:
        n_labels: including a last one, which every clip has.
        n_groups: unassigned groups of each label.
        list_of: list of each group, -1 if it is unassigned.
        lacking: of each label, the lists without it.
        missing: (labels, L) expected minus assigned clips.
        weight: (labels, L) of the chi-square distance.
        gain: (labels, L) by how much one more clip reduces the distance.
    """

    def __init__(self, contents: Sequence[_Content], shares: np.ndarray, first_has_all: bool) -> None:
        self.contents = contents
        self.n_lists = len(shares)
        self.first_has_all = first_has_all
        self.n_labels = 1 + max(content[-1][0] for content in contents)
        self.list_of = [-1] * len(contents)
        self.n_groups = [0] * self.n_labels
        n_clips = [0] * self.n_labels
        for content in contents:
            for label, count in content:
                self.n_groups[label] += 1
                n_clips[label] += count
        self.lacking = [set(range(self.n_lists)) for _ in n_clips]
        # Lists of numbers, which are faster than arrays of L numbers.
        self.missing = [(n * shares).tolist() for n in n_clips]
        self.weight = [(1 / (n * shares)).tolist() for n in n_clips]
        self.gain = [
            [(2 * w - 1) * k for w, k in zip(*row, strict=True)] for row in zip(self.missing, self.weight, strict=True)
        ]

    def assign(self, label: int, groups: Sequence[int]) -> set[int]:
        """Assign the unassigned groups of a label; return the other labels of these groups."""
        changed: set[int] = set()
        for group in groups:
            if self.list_of[group] < 0:
                content = self.contents[group]
                chosen = self._choose(content, label)
                self.list_of[group] = chosen
                for other, count in content:
                    self.n_groups[other] -= 1
                    self.missing[other][chosen] -= count
                    self.gain[other][chosen] = (2 * self.missing[other][chosen] - 1) * self.weight[other][chosen]
                    self.lacking[other].discard(chosen)
                    changed.add(other)
        return changed - {label, self.n_labels - 1}

    def _choose(self, content: _Content, label: int) -> int:
        """Return the list in which the group reduces the distance most, of those that the label allows."""
        if content[-1][1] == 1:
            gains = list(map(math.fsum, zip(*[self.gain[other] for other, _ in content], strict=True)))
        else:
            gains = [0.0] * self.n_lists
            for other, count in content:
                for number, (gain, weight) in enumerate(zip(self.gain[other], self.weight[other], strict=True)):
                    gains[number] += count * (gain - (count - 1) * weight)
        lacking, n_groups = self.lacking[label], self.n_groups[label]
        if n_groups > len(lacking):
            return gains.index(max(gains))
        if self.first_has_all and n_groups == 1 and 0 in lacking:
            return 0
        return max(sorted(lacking), key=gains.__getitem__)


def _refine(lists: _Assignment, shares: np.ndarray) -> None:
    """Move groups to other lists, or exchange two, as long as that reduces the distance.

    With few groups (30 speakers), the greedy assignment is far from the optimum; with many, close to it.
    """
    n_groups, n_cells = len(lists.contents), len(lists.contents) * lists.n_labels
    if n_groups > _MAX_GROUPS or n_cells > _MAX_CELLS:
        return
    refinement = _Refinement(lists, shares)
    for _ in range(_MAX_PASSES):
        changed = [refinement.improve(group, n_groups * n_cells <= _MAX_COMPARED) for group in range(n_groups)]
        if not any(changed):
            break
    lists.list_of = refinement.list_of.tolist()


class _Refinement:
    """An assignment as arrays, changed group by group.

    A label that could be in every list but is not counts as much as the largest chi-square distance of a label.
    """

    def __init__(self, lists: _Assignment, shares: np.ndarray) -> None:
        n_lists = lists.n_lists
        self.counts = np.zeros((len(lists.contents), lists.n_labels))
        for group, content in enumerate(lists.contents):
            for label, count in content:
                self.counts[group, label] = count
        self.list_of = np.array(lists.list_of)
        totals = self.counts.sum(axis=0)
        self.expected = shares[:, None] * totals  # (L, labels)
        self.weight = 1 / (self.expected * totals)
        self.needed = np.repeat((self.counts > 0).sum(axis=0)[None] >= n_lists, n_lists, axis=0)
        self.needed[0] |= lists.first_has_all
        self.n_clips = np.stack([self.counts[self.list_of == number].sum(axis=0) for number in range(n_lists)])

    def _cost(self, number: int | np.ndarray, n_clips: np.ndarray) -> np.ndarray:
        """Return the distance of list `number` with `n_clips` of each label, summed over labels."""
        distance = (n_clips - self.expected[number]) ** 2 * self.weight[number]
        return (distance + ((n_clips == 0) & self.needed[number])).sum(axis=-1)

    def improve(self, group: int, exchange: bool) -> bool:
        """Move a group, or exchange it with another one if `exchange` is set; return whether that was done."""
        current, content, list_of, n_clips = self.list_of[group], self.counts[group], self.list_of, self.n_clips
        cost = self._cost(np.arange(len(n_clips)), n_clips)
        moved = self._cost(current, n_clips[current] - content) + self._cost(np.arange(len(n_clips)), n_clips + content)
        moved = moved - cost[current] - cost
        moved[current] = 0
        exchanged = np.zeros(len(self.counts))
        if exchange:
            more = self.counts - content
            exchanged = self._cost(current, n_clips[current] + more) + self._cost(list_of, n_clips[list_of] - more)
            exchanged = exchanged - cost[current] - cost[list_of]
            exchanged[list_of == current] = 0
        # Rounded, so that the last bits of a sum decide nothing.
        best_move, best_exchange = np.round(moved, 9).argmin(), np.round(exchanged, 9).argmin()
        if min(moved[best_move], exchanged[best_exchange]) > -_MIN_GAIN:
            return False
        if moved[best_move] <= exchanged[best_exchange]:
            target, change = best_move, content
        else:
            target, change = list_of[best_exchange], content - self.counts[best_exchange]
            list_of[best_exchange] = current
        list_of[group] = target
        n_clips[current] -= change
        n_clips[target] += change
        return True
