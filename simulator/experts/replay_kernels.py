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


@compiled
def next_use(  # type: ignore[no-untyped-def]
    experts, offsets, num_experts, slots, missed, window, one, short, long, latest, judge, weights
):  # fmt: skip
    words = (num_experts + 63) // 64
    ring = window + 1
    past = np.zeros((ring, words), np.uint64)
    masks = np.zeros((ring, num_experts), np.int32)
    common = np.zeros(ring, np.int64)
    before = np.zeros(ring, np.int64)
    alike = np.zeros(ring, np.int64)
    lately = np.zeros(num_experts, np.int64)
    overall = np.zeros(num_experts, np.int64)
    grown = np.zeros((num_experts, 2), np.int64)
    short_explains = np.int64(0)
    long_explains = np.int64(0)
    votes = np.zeros(num_experts, np.int32)
    active = np.full(num_experts, -1, np.int64)
    slot_of = np.full(num_experts, -1, np.int64)
    held = np.full(slots, -1, np.int64)
    # What stays longest has most: a pending resident more than any other, and of several the lowest id.
    pending = np.int64(2**62)
    stays = np.zeros(slots, np.int64)
    now = np.zeros(words, np.uint64)
    used = 0
    for b in range(len(offsets) - 1):
        now[:] = 0
        row = b % ring
        if b >= ring:
            for i in range(offsets[b - ring], offsets[b - ring + 1]):
                masks[row, experts[i]] = 0
        for i in range(offsets[b], offsets[b + 1]):
            active[experts[i]] = b
            masks[row, experts[i]] = -1
            now[experts[i] >> 6] |= np.uint64(1) << np.uint64(experts[i] & 63)
        past[row] = now
        common, before = before, common
        for row in range(min(b, ring)):
            shared = 0
            for w in range(words):
                shared += _ones(past[row, w] & now[w])
            common[row] = shared
        best = 1
        row = max(0, b - window) % ring
        last = before[(row + window) % ring] if b > window else 0
        for _ in range(min(b, window)):
            alike[row] = 2 * common[row] + last
            best = max(best, alike[row])
            last = before[row]
            row = row + 1 if row < window else 0
        scale = (64 << 16) // best
        votes[:] = 0
        total = 0
        passed = 0
        row = max(0, b - window) % ring
        for other in range(max(0, b - window), b):
            passed = weights[(alike[row] * scale) >> 16] + (passed >> 1)
            row = row + 1 if row < window else 0
            if passed == 0:
                continue
            total += passed
            first, stop = offsets[other + 1], offsets[other + 2]
            if 8 * (stop - first) < num_experts:
                for i in range(first, stop):
                    votes[experts[i]] += passed
            else:
                # Adding to all experts at once, most of them in vector registers, is faster than to some.
                mask = masks[row]
                add = np.int32(passed)
                for expert in range(num_experts):
                    votes[expert] += add & mask[expert]
        short_met, long_met, short_whole, long_whole = 0, 0, 1, 1
        for i in range(offsets[b], offsets[b + 1]):
            expert = experts[i]
            short_met += lately[expert] >> 8
            long_met += overall[expert] >> 8
            grown[expert, 0] = lately[expert] + ((one - lately[expert]) >> short)
            grown[expert, 1] = overall[expert] + ((one - overall[expert]) >> long)
        # First all as if none were active, without a branch, which vector registers can do; then the active ones.
        for expert in range(num_experts):
            off = lately[expert] >> 8
            short_whole += off * off
            lately[expert] += -lately[expert] >> short
        for expert in range(num_experts):
            off = overall[expert] >> 8
            long_whole += off * off
            overall[expert] += -overall[expert] >> long
        for i in range(offsets[b], offsets[b + 1]):
            lately[experts[i]] = grown[experts[i], 0]
            overall[experts[i]] = grown[experts[i], 1]
        short_explains += (short_met * short_met << 8) // short_whole - (short_explains >> judge)
        long_explains += (long_met * long_met << 8) // long_whole - (long_explains >> judge)
        share = overall if long_explains > short_explains else lately
        for s in range(used):
            expert = held[s]
            if active[expert] == b:
                stays[s] = pending + num_experts - 1 - expert
            else:
                stays[s] = votes[expert] * one + (total + 1) * share[expert]
        for i in range(offsets[b], offsets[b + 1]):
            expert = experts[i]
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
                        if stays[s] < least or (stays[s] == least and held[s] > held[slot]):
                            least = stays[s]
                            slot = s
                    slot_of[held[slot]] = -1
                held[slot] = expert
                slot_of[expert] = slot
            stays[slot] = votes[expert] * one + (total + 1) * (share[expert] + latest)
