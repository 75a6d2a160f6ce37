// What a call of decode attention is given, and how it is cut into pieces. Shared by all variants of the kernel.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#define INLINE static inline __attribute__((always_inline))

namespace attention {

constexpr int kBlock = 32;       // tokens that are scored, weighted and added up together
constexpr int kPad = 32;         // rows of float buffers are padded to this: two vectors of the widest variant
constexpr int kCacheLine = 64;

inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

struct Problem {
    const void* q;            // [n, heads * key_dim]
    const void* kv;           // [capacity, row]
    void* out;                // [n, heads * value_dim]
    const int64_t* starts;    // [n]
    const int64_t* lengths;   // [n]
    const float* sinks;       // [heads], or null
    int64_t n, heads, kv_heads, key_dim, value_dim, value_offset;
    int64_t q_stride, kv_stride, out_stride;  // elements from one row to the next
    float scale;

    int64_t group() const { return heads / kv_heads; }
    // Where a head's maximum and denominator stand: every group begins with a whole vector.
    int64_t place(int64_t head) const { return head / group() * padded(group()) + head % group(); }
    int64_t places() const { return kv_heads * padded(group()); }
    // Whether a block is converted to floats, in whole pairs of vectors (`pair` elements), before it is used: heads end
    // within them, or many heads would convert the same elements again.
    bool staged(int64_t pair, size_t element, bool never_widened) const {
        const bool many = group() > 8 && (element < 4 || kv_heads == 1);
        return key_dim % pair != 0 || value_dim % pair != 0 || (many && !never_widened);
    }
    // Latent attention: the values are a part of the keys.
    bool values_in_keys() const { return kv_heads == 1 && value_offset == 0 && value_dim <= key_dim; }
};

// Some tokens of one sequence. `part` is where the piece leaves its share of the softmax; -1: it is the whole sequence.
struct Piece {
    int64_t sequence, first, count, part;
};

// The pieces of one sequence that was cut: the thread that finishes the last one adds them up.
struct Cut {
    int64_t part = 0, pieces = 0;
    std::atomic<int64_t> left{0};
};

struct Job {
    const Problem& problem;
    const std::vector<Piece>& pieces;
    std::vector<Cut>& cuts;  // one per sequence
    float* parts;            // [parts, part_floats()]
    std::atomic<int64_t> next{0};

    int64_t claim() { return next.fetch_add(1, std::memory_order_relaxed); }
};

// Floats of one piece's state: sums of weighted values, then maxima and denominators of all heads.
inline int64_t part_floats(const Problem& p) { return p.heads * padded(p.value_dim) + 2 * p.places(); }

struct State {
    float *sums, *maxima, *denominators;

    State(const Problem& p, float* at)
        : sums(at), maxima(at + p.heads * padded(p.value_dim)), denominators(maxima + p.places()) {}
};

// Float buffers of one thread, cut out of one allocation.
struct Buffers {
    float *queries, *state, *scores, *rescale, *found, *keys, *values;

    static int64_t floats(const Problem& p) {
        return p.heads * padded(p.key_dim) + part_floats(p) + padded(p.group()) * (kBlock + 2) +
               kBlock * (padded(p.key_dim) + padded(p.value_dim));
    }
    Buffers(const Problem& p, float* at) {
        queries = at;
        state = queries + p.heads * padded(p.key_dim);
        scores = state + part_floats(p);
        rescale = scores + padded(p.group()) * kBlock;
        found = rescale + padded(p.group());
        keys = found + padded(p.group());
        values = keys + kBlock * padded(p.key_dim);
    }
};

// Asks for the rows of the next block, some cache lines at a time, so that memory works while the kernel computes.
class Prefetch {
  public:
    Prefetch(const void* rows, int64_t count, int64_t row_bytes, int64_t stride_bytes, int64_t steps)
        : row_(static_cast<const char*>(rows)), stride_(stride_bytes), rows_(count), size_(row_bytes) {
        if (row_bytes == stride_bytes) rows_ = count > 0, size_ = count * row_bytes;  // one piece
        if (steps == 0) rows_ = 0;
        else quota_ = (count * row_bytes / kCacheLine + steps) / steps * kCacheLine;
    }
    inline __attribute__((always_inline)) void step() {
        if (rows_ == 0) return;
        const char* const row = row_;
        const int64_t last = at_ + quota_ < size_ ? at_ + quota_ : size_;
        for (int64_t i = at_; i < last; i += kCacheLine) __builtin_prefetch(row + i, 0, 2);
        at_ = last;
        if (last == size_) at_ = 0, row_ += stride_, --rows_;
    }

  private:
    const char* row_;
    int64_t stride_, rows_, size_, quota_ = 0, at_ = 0;
};

}  // namespace attention
