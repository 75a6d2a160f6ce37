"""The loops of `simulator.experts.replay`, compiled: one per policy of `simulator.experts.cache`.

Each takes ``experts`` and ``offsets`` of `LayerAccesses`, the number of experts, the slots, and ``missed``, where it
writes 1 for every access that misses.
"""

from __future__ import annotations

import numpy as np

from simulator.kernels import compiled

__all__ = ["active_sets", "belady", "fifo", "inactive_first_lifo", "lfu", "lifo", "lru", "next_use"]


@compiled
def _ones(bits):  # type: ignore[no-untyped-def]
    """Ones among 64 bits; compiles to one instruction."""
    bits = bits - ((bits >> np.uint64(1)) & np.uint64(0x5555555555555555))
    bits = (bits & np.uint64(0x3333333333333333)) + ((bits >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bits = (bits + (bits >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((bits * np.uint64(0x0101010101010101)) >> np.uint64(56))


@compiled
def active_sets(chosen, bounds, num_experts, experts, offsets):  # type: ignore[no-untyped-def]
    """Distinct ids of every batch, sorted; returns how many there are in all."""
    seen = np.full(num_experts, -1, np.int64)
    at = 0
    for b in range(len(bounds) - 1):
        first = at
        for token in range(bounds[b], bounds[b + 1]):
            for choice in range(chosen.shape[1]):
                expert = np.int64(chosen[token, choice])
                if seen[expert] != b:
                    seen[expert] = b
                    experts[at] = expert
                    at += 1
        if (at - first) * (at - first) < 4 * num_experts:
            for i in range(first + 1, at):
                moved = experts[i]
                j = i - 1
                while j >= first and experts[j] > moved:
                    experts[j + 1] = experts[j]
                    j -= 1
                experts[j + 1] = moved
        else:
            at = first
            for expert in range(num_experts):
                if seen[expert] == b:
                    experts[at] = expert
                    at += 1
        offsets[b + 1] = at
    return at


@compiled
def fifo(experts, offsets, num_experts, slots, missed):  # type: ignore[no-untyped-def]
    there = np.zeros(num_experts, np.bool_)
    held = np.full(slots, -1, np.int64)
    oldest = 0
    for i in range(len(experts)):
        expert = experts[i]
        if there[expert]:
            continue
        missed[i] = 1
        if held[oldest] >= 0:
            there[held[oldest]] = False
        held[oldest] = expert
        there[expert] = True
        oldest += 1
        if oldest == slots:
            oldest = 0


@compiled
def lifo(experts, offsets, num_experts, slots, missed):  # type: ignore[no-untyped-def]
    there = np.zeros(num_experts, np.bool_)
    used = 0
    last = -1
    for i in range(len(experts)):
        expert = experts[i]
        if there[expert]:
            continue
        missed[i] = 1
        if used == slots:
            there[last] = False
        else:
            used += 1
        last = expert
        there[expert] = True


@compiled
def inactive_first_lifo(experts, offsets, num_experts, slots, missed):  # type: ignore[no-untyped-def]
    # A doubly linked list by admission; `num_experts` is its head and tail.
    older = np.full(num_experts + 1, num_experts, np.int64)
    newer = np.full(num_experts + 1, num_experts, np.int64)
    there = np.zeros(num_experts, np.bool_)
    active = np.full(num_experts, -1, np.int64)
    used = 0
    for b in range(len(offsets) - 1):
        for i in range(offsets[b], offsets[b + 1]):
            active[experts[i]] = b
        # Whatever is newer than `look` is active in this batch.
        look = older[num_experts]
        for i in range(offsets[b], offsets[b + 1]):
            expert = experts[i]
            if there[expert]:
                continue
            missed[i] = 1
            if used == slots:
                while look != num_experts and active[look] == b:
                    look = older[look]
                gone = look if look != num_experts else older[num_experts]
                if look != num_experts:
                    look = older[look]
                older[newer[gone]] = older[gone]
                newer[older[gone]] = newer[gone]
                there[gone] = False
            else:
                used += 1
            last = older[num_experts]
            newer[last] = expert
            older[expert] = last
            newer[expert] = num_experts
            older[num_experts] = expert
            there[expert] = True


@compiled
def lru(experts, offsets, num_experts, slots, missed):  # type: ignore[no-untyped-def]
    # A doubly linked list by last use; `num_experts` is its head and tail.
    older = np.full(num_experts + 1, num_experts, np.int64)
    newer = np.full(num_experts + 1, num_experts, np.int64)
    there = np.zeros(num_experts, np.bool_)
    used = 0
    for i in range(len(experts)):
        expert = experts[i]
        if there[expert]:
            older[newer[expert]] = older[expert]
            newer[older[expert]] = newer[expert]
        else:
            missed[i] = 1
            there[expert] = True
            if used == slots:
                gone = newer[num_experts]
                newer[num_experts] = newer[gone]
                older[newer[gone]] = num_experts
                there[gone] = False
            else:
                used += 1
        last = older[num_experts]
        newer[last] = expert
        older[expert] = last
        newer[expert] = num_experts
        older[num_experts] = expert


@compiled
def lfu(experts, offsets, num_experts, slots, missed):  # type: ignore[no-untyped-def]
    slot_of = np.full(num_experts, -1, np.int64)
    held = np.full(slots, -1, np.int64)
    uses = np.zeros(num_experts, np.int64)
    stays = np.zeros(slots, np.int64)
    used = 0
    for i in range(len(experts)):
        expert = experts[i]
        uses[expert] += 1
        slot = slot_of[expert]
        if slot < 0:
            missed[i] = 1
            if used < slots:
                slot = used
                used += 1
            else:
                slot = 0
                least = stays[0]
                for s in range(1, slots):
                    if stays[s] < least:
                        least = stays[s]
                        slot = s
                slot_of[held[slot]] = -1
            held[slot] = expert
            slot_of[expert] = slot
        # Uses first, then the last one: fewer than 2**23 batches and 2**40 accesses.
        stays[slot] = (uses[expert] << 40) + i


@compiled
def belady(experts, offsets, num_experts, slots, missed):  # type: ignore[no-untyped-def]
    accesses = len(experts)
    soonest = np.empty(num_experts, np.int64)
    for expert in range(num_experts):
        soonest[expert] = accesses + expert
    following = np.empty(accesses, np.int64)
    for i in range(accesses - 1, -1, -1):
        following[i] = soonest[experts[i]]
        soonest[experts[i]] = i
    slot_of = np.full(num_experts, -1, np.int64)
    held = np.full(slots, -1, np.int64)
    leaves = np.zeros(slots, np.int64)
    used = 0
    for i in range(accesses):
        expert = experts[i]
        slot = slot_of[expert]
        if slot < 0:
            missed[i] = 1
            if used < slots:
                slot = used
                used += 1
            else:
                slot = 0
                most = leaves[0]
                for s in range(1, slots):
                    if leaves[s] > most:
                        most = leaves[s]
                        slot = s
                slot_of[held[slot]] = -1
            held[slot] = expert
            slot_of[expert] = slot
        leaves[slot] = following[i]


_BLOCK = 16_384
"""Experts whose squared shares, of at most 2**16 each, add up within 32 bits."""


@compiled
def _forget(share, forget):  # type: ignore[no-untyped-def]
    """What is left of every share if its expert was not used, in place; the sum of squares of the shares before.

    Without a branch, in 32 bits and from 0 on, which vector registers do many at a time.
    """
    forget = forget & 31
    whole = np.int64(0)
    for first in range(0, len(share), _BLOCK):
        part = share[first : first + _BLOCK]
        squares = np.int32(0)
        for i in range(len(part)):
            often = part[i]
            off = np.int32(often >> 8)
            squares = np.int32(squares + np.int32(off * off))
            part[i] = np.int32(often + np.int32(np.int32(-often) >> forget))
        whole += squares
    return whole


@compiled
def _likeness_votes(met, before, weights, given):  # type: ignore[no-untyped-def]
    """What every batch looked back on gives to the experts of the one after it, in `given`; the sum of all.

    From the experts that it has in common with this batch, `met`, and that the batches before the two have, `before`.
    """
    count = len(met)
    best = np.int32(1)
    for j in range(count):
        likeness = np.int32(np.int32(2 * met[j]) + before[j])
        given[j] = likeness
        best = max(best, likeness)
    scale = (64 << 16) // np.int64(best)
    total = 0
    passed = 0
    for j in range(count):
        passed >>= 1
        if given[j]:
            passed += weights[(np.int64(given[j]) * scale) >> 16]
        given[j] = passed
        total += passed
    return total


@compiled
def _least(stays, held, slot_of):  # type: ignore[no-untyped-def]
    """The slot whose expert stays least long; of several the one with the highest id.

    Without a branch, which vector registers do many at a time.
    """
    least = stays[0]
    for s in range(1, len(stays)):
        least = min(least, stays[s])
    highest = np.int32(-1)
    for s in range(len(stays)):
        highest = max(highest, held[s] if stays[s] == least else np.int32(-1))
    return slot_of[highest]


@compiled
def _vote_one_by_one(votes, experts, batch_of, given, first):  # type: ignore[no-untyped-def]
    """Add ``given[b - first]`` to the votes of the expert of every access, whose batch is b."""
    for i in range(len(experts)):
        # Unsigned indices need no look at whether they count from the end.
        expert, batch = np.uint32(experts[i]), np.uint32(batch_of[i] - first)
        votes[expert] = np.int32(votes[expert] + given[batch])


@compiled
def _vote_by_rows(votes, masks, given, row, count):  # type: ignore[no-untyped-def]
    """Add ``given[j]`` to the votes of the experts in each of `count` rows of the ring after `row`; zeros follow.

    To all experts at once, in vector registers, and four rows at a time.
    """
    last = len(masks) - 1
    for j in range(0, count, 4):
        row = row + 1 if row < last else 0
        mask_0, add_0 = masks[row], given[j]
        row = row + 1 if row < last else 0
        mask_1, add_1 = masks[row], given[j + 1]
        row = row + 1 if row < last else 0
        mask_2, add_2 = masks[row], given[j + 2]
        row = row + 1 if row < last else 0
        mask_3, add_3 = masks[row], given[j + 3]
        if not (add_0 | add_1 | add_2 | add_3):
            continue
        for expert in range(len(votes)):
            one = np.int32(np.int32(add_0 & mask_0[expert]) + np.int32(add_1 & mask_1[expert]))
            two = np.int32(np.int32(add_2 & mask_2[expert]) + np.int32(add_3 & mask_3[expert]))
            votes[expert] = np.int32(votes[expert] + np.int32(one + two))


@compiled
def next_use(  # type: ignore[no-untyped-def]
    experts, offsets, num_experts, slots, missed, window, one, short, long, latest, judge, weights
):  # fmt: skip
    one = np.int64(one)  # without numba, too
    words = (num_experts + 63) // 64
    ring = window + 1
    past = np.zeros((ring, words), np.uint64)
    masks = np.zeros((ring, num_experts), np.int32)
    # Of the batches that are looked back on, oldest first, and of those before them.
    common = np.zeros(ring, np.int32)
    before = np.zeros(ring, np.int32)
    given = np.zeros(window + 3, np.int32)
    # Which batch every access was of, and the access before it to the same expert; fewer than 2**31 of either.
    batch_of = np.empty(len(experts), np.int32)
    earlier = np.empty(len(experts), np.int32)
    newest = np.full(num_experts, -1, np.int32)
    lately = np.zeros(num_experts, np.int32)
    overall = np.zeros(num_experts, np.int32)
    grown = np.zeros((num_experts, 2), np.int32)
    short_explains = np.int64(0)
    long_explains = np.int64(0)
    votes = np.zeros(num_experts, np.int32)
    slot_of = np.full(num_experts, -1, np.int64)
    held = np.zeros(slots, np.int32)
    # What stays longest has most: a pending resident more than any other, and of several the lowest id.
    pending = np.int64(2**62)
    stays = np.zeros(slots, np.int64)
    used = 0
    most = 0
    for b in range(len(offsets) - 1):
        most = max(most, offsets[b + 1] - offsets[b])
    # Batches with so few experts never ask for the bits, or for the masks, of those before them.
    needs_past, needs_masks = 4 * most * most >= words * num_experts, 12 * most >= num_experts
    for b in range(len(offsets) - 1):
        begin, end = offsets[b], offsets[b + 1]
        row = b % ring
        now = past[row]
        if needs_masks:
            if b >= ring:
                for i in range(offsets[b - ring], offsets[b - ring + 1]):
                    masks[row, experts[i]] = 0
            for i in range(begin, end):
                masks[row, experts[i]] = -1
        if needs_past:
            now[:] = 0
            for i in range(begin, end):
                now[experts[i] >> 6] |= np.uint64(1) << np.uint64(experts[i] & 63)
        count = min(b, window)
        oldest = b - count
        # Until the window is full, the oldest batch stays the same: the next one finds these moved by one.
        common, before = before, common
        met = common[1 : 1 + count] if b < window else common[:count]
        if not needs_past or 4 * (end - begin) * (begin - offsets[oldest]) < count * words * num_experts:
            # Few accesses: each finds those before it to the same expert.
            met[:] = 0
            for i in range(begin, end):
                at = newest[experts[i]]
                while at >= offsets[oldest]:
                    met[batch_of[at] - oldest] += np.int32(1)
                    at = earlier[at]
        else:
            row = oldest % ring
            for j in range(count):
                shared = 0
                for w in range(words):
                    shared += _ones(past[row, w] & now[w])
                met[j] = shared
                row = row + 1 if row < window else 0
        for i in range(begin, end):
            batch_of[i] = b
            earlier[i] = newest[experts[i]]
            newest[experts[i]] = i
        short_met, long_met = np.int64(0), np.int64(0)
        for i in range(begin, end):
            expert = experts[i]
            short_met += lately[expert] >> 8
            long_met += overall[expert] >> 8
            grown[expert, 0] = lately[expert] + ((one - lately[expert]) >> short)
            grown[expert, 1] = overall[expert] + ((one - overall[expert]) >> long)
        # First all as if none were active; then the active ones.
        short_whole, long_whole = 1 + _forget(lately, short), 1 + _forget(overall, long)
        for i in range(begin, end):
            lately[experts[i]] = grown[experts[i], 0]
            overall[experts[i]] = grown[experts[i], 1]
        short_explains += (short_met * short_met << 8) // short_whole - (short_explains >> judge)
        long_explains += (long_met * long_met << 8) // long_whole - (long_explains >> judge)
        share = overall if long_explains > short_explains else lately
        ranked = False
        total = 0
        for i in range(begin, end):
            expert = experts[i]
            slot = slot_of[expert]
            if slot < 0:
                missed[i] = 1
                if used < slots:
                    slot = used
                    used += 1
                else:
                    if not ranked:
                        # Nobody is ranked before somebody has to leave.
                        ranked = True
                        total = np.int64(_likeness_votes(met, before, weights, given))
                        votes[:] = 0
                        if not needs_masks or (count and 12 * (end - offsets[oldest]) < count * num_experts):
                            seen = slice(offsets[oldest + 1], end)
                            _vote_one_by_one(votes, experts[seen], batch_of[seen], given, oldest + 1)
                        else:
                            given[count : count + 3] = 0
                            _vote_by_rows(votes, masks, given, oldest % ring, count)
                        for s in range(slots):
                            resident = np.uint32(held[s])
                            stays[s] = votes[resident] * one + (total + 1) * share[resident]
                        for other in range(begin, end):
                            s = slot_of[experts[other]]
                            if s >= 0 and other > i:
                                stays[s] = pending + num_experts - 1 - experts[other]
                            elif s >= 0:
                                stays[s] += (total + 1) * latest
                    slot = _least(stays, held, slot_of)
                    slot_of[held[slot]] = -1
                held[slot] = expert
                slot_of[expert] = slot
            if ranked:
                stays[slot] = votes[expert] * one + (total + 1) * (share[expert] + latest)
