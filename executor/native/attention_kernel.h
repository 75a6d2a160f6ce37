// Decode attention in terms of the vectors of one variant. Included once per variant, inside its namespace.
//
// Softmax is taken to base 2: queries carry scale * log2(e). Tokens go block by block with a running maximum; what was
// summed before is rescaled when the maximum grows.

constexpr int P = 2 * W;  // elements that are loaded at once: two vectors, whose order is the data type's own matter
constexpr int kTokens = 4;  // tokens that are scored in registers at once
constexpr int kMany = 8;  // heads, and tokens, that meet in registers where queries are interleaved
constexpr int kNear = 8;  // tokens whose keys all heads of a group see before the next ones
constexpr float kLog2e = 1.44269504088896341f;

// 2^x for x <= 0, to about one unit in the last place; at least 2^-126.
INLINE V exp2_of(V x) {
    V power;
    x = maximum(set1(-126.0f), x);
    const V f = x - rounded(x, power);
    // Taylor's series of exp(f ln 2); |f| <= 1/2.
    V y = set1(1.5403530393e-4f);
    y = fma(y, f, set1(1.3333558146e-3f));
    y = fma(y, f, set1(9.6181291076e-3f));
    y = fma(y, f, set1(5.5504108665e-2f));
    y = fma(y, f, set1(2.4022650696e-1f));
    y = fma(y, f, set1(6.9314718056e-1f));
    y = fma(y, f, set1(1.0f));
    return y * power;
}

// The last elements of a row, where fewer than P are left; the rest is zero.
template <class D>
INLINE void load_tail(const typename D::T* at, int64_t count, V& a, V& b) {
    alignas(64) typename D::T whole[P] = {};
    std::memcpy(whole, at, count * sizeof(typename D::T));
    D::load2(whole, a, b);
}

// `size` elements as floats in the order of load2, times `factor`.
template <class D>
static void convert(const typename D::T* from, int64_t size, float factor, float* to) {
    const V f = set1(factor);
    V a, b;
    int64_t i = 0;
    for (; i + P <= size; i += P) {
        D::load2(from + i, a, b);
        store(to + i, a * f), store(to + i + W, b * f);
    }
    if (i < size) {
        load_tail<D>(from + i, size - i, a, b);
        store(to + i, a * f), store(to + i + W, b * f);
    }
}

// Back from the order of load2, times `factor`.
template <class D>
static void write(const float* from, int64_t size, float factor, typename D::T* to) {
    const V f = set1(factor);
    int64_t i = 0;
    for (; i + P <= size; i += P) D::store2(to + i, load(from + i) * f, load(from + i + W) * f);
    if (i < size) {
        alignas(64) typename D::T whole[P];
        D::store2(whole, load(from + i) * f, load(from + i + W) * f);
        std::memcpy(to + i, whole, (size - i) * sizeof(typename D::T));
    }
}

// Asks for as much of the next block as one load2 takes. It comes no nearer than the second cache: in the first, rows
// that lie a power of two apart drive each other out.
template <class T>
INLINE void ask_for_next(const T* at) {
    for (int i = 0; i < P; i += kCacheLine / static_cast<int>(sizeof(T))) __builtin_prefetch(at + i, 0, 2);
}

// Rows of one head in a block of tokens.
template <class D>
struct Rows {
    const typename D::T* at;
    int64_t stride, count;

    const typename D::T* operator[](int64_t t) const { return at + t * stride; }
    Rows shifted(int64_t elements) const { return {at + elements, stride, count}; }
};

// scores[h][t] = queries[h] . keys[t] for H heads and four tokens from `first` on; `dim` is a multiple of P. With Next,
// `next` is read through as far as these keys are long.
template <class D, int H, bool Next>
INLINE void score_tile(const float* queries, int64_t query_stride, const Rows<D>& keys, int64_t first, int64_t dim,
                       float* scores, const typename D::T* next) {
    // Behind the last token it is read again; softmax hides what comes of it.
    const typename D::T* row[kTokens];
    for (int t = 0; t < kTokens; ++t) row[t] = keys[first + t < keys.count ? first + t : keys.count - 1];
    V sum[H][kTokens];
    for (int h = 0; h < H; ++h)
        for (int t = 0; t < kTokens; ++t) sum[h][t] = set1(0.0f);
    for (int64_t i = 0; i < dim; i += P) {
        typename D::Elements query[H];
        for (int h = 0; h < H; ++h) query[h] = D::query(queries + h * query_stride, i);
        for (int t = 0; t < kTokens; ++t) {
            const typename D::Elements key = D::key(row[t] + i);
            if (Next) ask_for_next(next), next += P;
            for (int h = 0; h < H; ++h) sum[h][t] = D::dot(sum[h][t], query[h], key);
        }
    }
    for (int h = 0; h < H; ++h) sums4(sum[h][0], sum[h][1], sum[h][2], sum[h][3], scores + h * kBlock + first);
}

template <class D, int H, bool Next>
static void score_heads(const float* queries, int64_t query_stride, const Rows<D>& keys, int64_t first, int64_t last,
                        int64_t dim, float* scores, const typename D::T* next) {
    for (int64_t t = first; t < last; t += kTokens)
        score_tile<D, H, Next>(queries, query_stride, keys, t, dim, scores, next + t * dim);
}

// Scores of a block for one key head and the `group` query heads that share it. A few tokens at a time, so that their
// keys stay in the nearest cache while all heads pass by. The first heads ask for what comes next.
template <class D, bool Next>
static void score(const float* queries, int64_t query_stride, int64_t group, const Rows<D>& keys, int64_t dim,
                  float* scores, const typename D::T* next, Prefetch& prefetch) {
    for (int64_t t = 0; t < keys.count; t += kNear) {
        const int64_t last = t + kNear < keys.count ? t + kNear : keys.count;
        int64_t h = 0;
        if (Next && group >= kHeads) {
            score_heads<D, kHeads, true>(queries, query_stride, keys, t, last, dim, scores, next);
            h = kHeads;
        } else if (Next) {
            score_heads<D, 1, true>(queries, query_stride, keys, t, last, dim, scores, next);
            h = 1;
        }
        for (; h + kHeads <= group; h += kHeads) {
            score_heads<D, kHeads, false>(queries + h * query_stride, query_stride, keys, t, last, dim,
                                          scores + h * kBlock, next);
            prefetch.step();
        }
        for (; h < group; ++h)
            score_heads<D, 1, false>(queries + h * query_stride, query_stride, keys, t, last, dim,
                                     scores + h * kBlock, next);
        prefetch.step();
    }
}

// Queries of every four heads, in place: row j of the four gets the j-th quarters of all four's vectors. A row has
// `floats` floats, or as many pairs.
template <class D>
static void interleave(float* queries, int64_t stride, int64_t heads, int64_t floats) {
    for (int64_t h = 0; h < heads; h += 4)
        for (int64_t i = 0; i < floats; i += W) {
            float* at = queries + h * stride + i;
            V a = load(at), b = load(at + stride), c = load(at + 2 * stride), d = load(at + 3 * stride);
            D::interleave4(a, b, c, d);
            store(at, a), store(at + stride, b), store(at + 2 * stride, c), store(at + 3 * stride, d);
        }
}

// score_tile for kMany heads whose queries are interleaved and T tokens. A quarter of a vector of keys meets four heads
// at once: keys are loaded and converted once for all heads, and few lanes are left to be added up in the end.
template <class D, int T, bool Next>
__attribute__((noinline)) static void score_interleaved_tile(const float* queries, int64_t query_stride,
                                                             const Rows<D>& keys, int64_t first, int64_t dim,
                                                             float* scores, const typename D::T* next) {
    constexpr int kWhole = (T + 3) / 4 * 4;
    V low[kWhole], high[kWhole];  // of the first four heads, of the last four
#pragma GCC unroll 8
    for (int t = 0; t < kWhole; ++t) low[t] = high[t] = set1(0.0f);
    const typename D::T* row = keys[first];
    const int64_t stride = keys.stride;
    for (int64_t i = 0; i < dim; i += P, row += P) {
        if (Next)
            for (int t = 0; t < T; ++t, next += P) ask_for_next(next);
        const float *of_low = queries, *of_high = of_low + 4 * query_stride;
        // Unrolled, it would want more registers than there are.
#pragma GCC unroll 1
        for (int j = 0; j < 4; ++j, of_low += query_stride, of_high += query_stride) {
            const typename D::Elements low_query = D::query(of_low, i), high_query = D::query(of_high, i);
            const typename D::T* at = row;
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t, at += stride) {
                const typename D::Elements key = D::spread(at, j);
                low[t] = D::dot(low[t], low_query, key);
                high[t] = D::dot(high[t], high_query, key);
            }
        }
    }
    scores += first;
#pragma GCC unroll 2
    for (int t = 0; t < kWhole; t += 4) {
        D::quarter_sums4(low[t], low[t + 1], low[t + 2], low[t + 3], scores + t, kBlock);
        D::quarter_sums4(high[t], high[t + 1], high[t + 2], high[t + 3], scores + 4 * kBlock + t, kBlock);
    }
}

template <class D, bool Next>
static void score_interleaved_heads(const float* queries, int64_t query_stride, const Rows<D>& keys, int64_t dim,
                                    float* scores, const typename D::T* next) {
    if (keys.count < kMany) {
        for (int64_t t = 0; t < keys.count; ++t)
            score_interleaved_tile<D, 1, Next>(queries, query_stride, keys, t, dim, scores, next + t * dim);
        return;
    }
    for (int64_t t = 0; t < keys.count; t += kMany) {
        // Some tokens come twice if kMany does not divide their number.
        const int64_t first = t + kMany < keys.count ? t : keys.count - kMany;
        score_interleaved_tile<D, kMany, Next>(queries, query_stride, keys, first, dim, scores, next + t * dim);
    }
}

// score() with interleaved queries. `next` is read through as far as these keys are long.
template <class D>
static void score_interleaved(const float* queries, int64_t query_stride, int64_t group, const Rows<D>& keys,
                              int64_t dim, float* scores, const typename D::T* next) {
    score_interleaved_heads<D, true>(queries, query_stride, keys, dim, scores, next);
    for (int64_t h = kMany; h < group; h += kMany)
        score_interleaved_heads<D, false>(queries + h * query_stride, query_stride, keys, dim, scores + h * kBlock,
                                          next);
}

// Greatest score of each of H heads.
template <int H>
INLINE void block_maxima(const float* scores, int64_t count, float* tops) {
    V top[4];
    for (int h = 0; h < 4; ++h) top[h] = set1(0.0f);
    for (int h = 0; h < H; ++h) {
        top[h] = load(scores + h * kBlock);
        for (int64_t t = W; t < count; t += W) top[h] = maximum(load(scores + h * kBlock + t), top[h]);
    }
    maxima4(top[0], top[1], top[2], top[3], tops);
}

// Scores of H heads to weights, in place, and their sums.
template <int H>
INLINE void block_weights(float* scores, int64_t count, const float* peaks, float* sums) {
    V sum[4];
    for (int h = 0; h < 4; ++h) sum[h] = set1(0.0f);
    for (int h = 0; h < H; ++h) {
        const V peak = set1(peaks[h]);
        for (int64_t t = 0; t < count; t += W) {
            const V weight = exp2_of(load(scores + h * kBlock + t) - peak);
            store(scores + h * kBlock + t, weight);
            sum[h] += weight;
        }
    }
    sums4(sum[0], sum[1], sum[2], sum[3], sums);
}

// Scores to weights, in place; maxima, denominators, and by how much earlier sums shrink. The arrays over heads have
// room for whole vectors.
static void softmax(float* scores, int64_t group, int64_t count, float* maxima, float* denominators, float* rescale,
                    float* found) {
    const int64_t whole = (count + W - 1) / W * W;
    for (int64_t h = 0; h < group; ++h)
        for (int64_t t = count; t < whole; ++t) scores[h * kBlock + t] = -__builtin_inff();
    int64_t h = 0;
    for (; h + 4 <= group; h += 4) block_maxima<4>(scores + h * kBlock, whole, found + h);
    for (; h < group; ++h) block_maxima<1>(scores + h * kBlock, whole, found + h);
    for (h = 0; h < group; h += W) {
        const V before = load(maxima + h), now = maximum(load(found + h), before);
        store(rescale + h, exp2_of(before - now));
        store(maxima + h, now);
    }
    for (h = 0; h + 4 <= group; h += 4) block_weights<4>(scores + h * kBlock, whole, maxima + h, found + h);
    for (; h < group; ++h) block_weights<1>(scores + h * kBlock, whole, maxima + h, found + h);
    for (h = 0; h < group; h += W)
        store(denominators + h, fma(load(denominators + h), load(rescale + h), load(found + h)));
}

// sums[h] = rescale[h] * sums[h] + weights[h] . values for H heads and C elements times two vectors.
template <class D, int H, int C, bool Next>
static void value_tile(const float* weights, const float* rescale, const Rows<D>& values, float* sums,
                       int64_t sum_stride, const typename D::T* next) {
    V sum[H][2 * C];
    for (int h = 0; h < H; ++h)
        for (int c = 0; c < 2 * C; ++c) sum[h][c] = set1(0.0f);
    const typename D::T* row = values.at;
    for (int64_t t = 0; t < values.count; t += D::kRows, row += D::kRows * values.stride) {
        const typename D::T* other = t + 1 < values.count ? row + values.stride : row;
        typename D::Weight weight[H];
        for (int h = 0; h < H; ++h) weight[h] = D::weight(weights + h * kBlock, t);
        for (int c = 0; c < C; ++c) {
            typename D::Values a, b;
            D::values(row + c * P, other + c * P, a, b);
            if (Next)
                for (int r = 0; r < D::kRows; ++r, next += P) ask_for_next(next);
            for (int h = 0; h < H; ++h) {
                sum[h][2 * c] = D::weighted(sum[h][2 * c], weight[h], a);
                sum[h][2 * c + 1] = D::weighted(sum[h][2 * c + 1], weight[h], b);
            }
        }
    }
    for (int h = 0; h < H; ++h)
        for (int c = 0; c < 2 * C; ++c) {
            float* at = sums + h * sum_stride + c * W;
            store(at, fma(load(at), set1(rescale[h]), sum[h][c]));
        }
}

template <class D, int H, int C, bool Next>
INLINE void value_column(const float* weights, const float* rescale, int64_t group, const Rows<D>& values, float* sums,
                         int64_t sum_stride, const typename D::T* next, Prefetch& prefetch) {
    int64_t h = 0;
    if (Next && group >= H) {
        value_tile<D, H, C, true>(weights, rescale, values, sums, sum_stride, next);
        h = H;
    } else if (Next) {
        value_tile<D, 1, C, true>(weights, rescale, values, sums, sum_stride, next);
        h = 1;
    }
    for (; h + H <= group; h += H) {
        value_tile<D, H, C, false>(weights + h * kBlock, rescale + h, values, sums + h * sum_stride, sum_stride, next);
        prefetch.step();
    }
    for (; h < group; ++h)
        value_tile<D, 1, C, false>(weights + h * kBlock, rescale + h, values, sums + h * sum_stride, sum_stride, next);
    prefetch.step();
}

// Weighted values of a block for one value head; `dim` is a multiple of P. With Next, `next` is read through as far as
// these values are long.
template <class D, bool Next>
static void add_values(const float* weights, const float* rescale, int64_t group, const Rows<D>& values, int64_t dim,
                       float* sums, int64_t sum_stride, const typename D::T* next, Prefetch& prefetch) {
    int64_t i = 0;
    // Whole groups of many heads take narrow columns, so that every element of a row is fetched and converted once.
    if (Next && group % (2 * kHeads) == 0)
        for (; i < dim; i += P)
            value_column<D, 2 * kHeads, 1, Next>(weights, rescale, group, values.shifted(i), sums + i, sum_stride,
                                                 next + i * values.count, prefetch);
    for (; i + 2 * P <= dim; i += 2 * P)
        value_column<D, kHeads, 2, Next>(weights, rescale, group, values.shifted(i), sums + i, sum_stride,
                                         next + i * values.count, prefetch);
    if (i < dim)
        value_column<D, kHeads, 1, Next>(weights, rescale, group, values.shifted(i), sums + i, sum_stride,
                                         next + i * values.count, prefetch);
}

// Whether a block is converted to floats before it is used.
template <class D>
static bool staged(const Problem& p) {
    return p.staged(P, sizeof(typename D::T), D::kPaired);
}

// Whether queries are interleaved: where many heads share keys that are not converted beforehand.
template <class D>
static bool interleaves(const Problem& p) {
    return D::kInterleaved && p.group() % kMany == 0 && !staged<D>(p);
}

// The queries of one sequence, as score() wants them.
template <class D>
static void prepare(const Problem& p, const typename D::T* q, float* queries) {
    const int64_t stride = padded(p.key_dim);
    for (int64_t h = 0; h < p.heads; ++h, q += p.key_dim)
        if (D::kPaired && !staged<D>(p))
            std::memcpy(queries + h * stride, q, p.key_dim * sizeof(*q));
        else
            convert<D>(q, p.key_dim, p.scale * kLog2e, queries + h * stride);
    if constexpr (D::kInterleaved)
        if (interleaves<D>(p)) interleave<D>(queries, stride, p.heads, D::floats(p.key_dim));
}

// One block of tokens for all heads; `after` are the rows that come next. They are asked for from their beginning to
// their end meanwhile, in the order in which they lie, which memory likes best.
template <class D>
static void attend_block(const Problem& p, const Buffers& buffers, const State& state, const typename D::T* rows,
                         int64_t count, const typename D::T* after, Prefetch& prefetch) {
    const int64_t group = p.group(), key_stride = padded(p.key_dim), value_stride = padded(p.value_dim);
    // Converted once where many heads read the same numbers, and where a head ends within a vector.
    const bool is_staged = staged<D>(p);
    for (int64_t g = 0; g < p.kv_heads; ++g) {
        const int64_t first = g * group, value_at = p.value_offset + g * p.value_dim;
        const float* queries = buffers.queries + first * key_stride;
        float *scores = buffers.scores, *sums = state.sums + first * value_stride;
        float* maxima = state.maxima + g * padded(group);
        float* denominators = state.denominators + g * padded(group);
        const Rows<D> keys{rows + g * p.key_dim, p.kv_stride, count};
        const Rows<D> values = keys.shifted(value_at - g * p.key_dim);
        // What this head reads is long enough to ask for as much of the next block; latent values are keys.
        const typename D::T* next = after + g * count * (p.key_dim + p.value_dim);
        const typename D::T* next_values = p.values_in_keys() ? after : next + count * p.key_dim;
        if (is_staged) {
            const bool shared = p.values_in_keys();
            for (int64_t t = 0; t < count; ++t) {
                convert<D>(keys[t], p.key_dim, 1.0f, buffers.keys + t * key_stride);
                if (!shared) convert<D>(values[t], p.value_dim, 1.0f, buffers.values + t * value_stride);
            }
            using Floats = Widened<F32>;
            const int64_t key_dim = (p.key_dim + P - 1) / P * P, value_dim = (p.value_dim + P - 1) / P * P;
            const Rows<Floats> near_keys{buffers.keys, key_stride, count};
            const Rows<Floats> near_values{buffers.values, value_stride, count};
            score<Floats, false>(queries, key_stride, group, near_keys, key_dim, scores, nullptr, prefetch);
            softmax(scores, group, count, maxima, denominators, buffers.rescale, buffers.found);
            add_values<Floats, false>(scores, buffers.rescale, group, shared ? near_keys : near_values, value_dim,
                                      sums, value_stride, nullptr, prefetch);
        } else {
            bool scored = false;
            if constexpr (D::kInterleaved)
                if (interleaves<D>(p))
                    score_interleaved<D>(queries, key_stride, group, keys, p.key_dim, scores, next), scored = true;
            if (!scored) score<D, true>(queries, key_stride, group, keys, p.key_dim, scores, next, prefetch);
            if constexpr (D::kPaired) D::scale(scores, group * kBlock, p.scale * kLog2e);
            softmax(scores, group, count, maxima, denominators, buffers.rescale, buffers.found);
            if constexpr (D::kPaired)
                for (int64_t h = 0; h < group; ++h) D::round_weights(scores + h * kBlock);
            add_values<D, true>(scores, buffers.rescale, group, values, p.value_dim, sums, value_stride, next_values,
                                prefetch);
        }
    }
}

// Sums to the row of output: divided by the denominator, to which a sink adds one more term.
template <class D>
static void finish(const Problem& p, const State& state, int64_t sequence) {
    typename D::T* out = static_cast<typename D::T*>(p.out) + sequence * p.out_stride;
    for (int64_t h = 0; h < p.heads; ++h) {
        const int64_t at = p.place(h);
        float factor = 1.0f / state.denominators[at];
        if (p.sinks) {
            const float sink = p.sinks[h] * kLog2e, peak = state.maxima[at];
            // Relative to the greater of the two, so that neither overflows.
            factor = sink > peak ? __builtin_exp2f(peak - sink) /
                                       (state.denominators[at] * __builtin_exp2f(peak - sink) + 1.0f)
                                 : 1.0f / (state.denominators[at] + __builtin_exp2f(sink - peak));
        }
        write<D>(state.sums + h * padded(p.value_dim), p.value_dim, factor, out + h * p.value_dim);
    }
}

// Adds the second state to the first.
static void merge(const Problem& p, const State& into, const State& from) {
    const int64_t size = padded(p.value_dim);
    for (int64_t h = 0; h < p.heads; ++h) {
        const int64_t at = p.place(h);
        const float peak = from.maxima[at] > into.maxima[at] ? from.maxima[at] : into.maxima[at];
        const float mine = __builtin_exp2f(into.maxima[at] - peak), theirs = __builtin_exp2f(from.maxima[at] - peak);
        float *a = into.sums + h * size, *b = from.sums + h * size;
        for (int64_t i = 0; i < size; i += W)
            store(a + i, fma(load(a + i), set1(mine), load(b + i) * set1(theirs)));
        into.denominators[at] = into.denominators[at] * mine + from.denominators[at] * theirs;
        into.maxima[at] = peak;
    }
}

// Takes pieces until none is left.
template <class D>
static void work(Job& job, float* scratch) {
    using T = typename D::T;
    const Problem& p = job.problem;
    const Buffers buffers(p, scratch);
    const int64_t pieces = job.pieces.size();
    const int64_t tiles = staged<D>(p) ? p.kv_heads * (p.group() / kHeads + 1) : 0;
    const int64_t head_end = p.kv_heads * p.key_dim, value_end = p.value_offset + p.kv_heads * p.value_dim;
    const int64_t row_bytes = (head_end > value_end ? head_end : value_end) * sizeof(T);
    const T* kv = static_cast<const T*>(p.kv);
    int64_t index = job.claim(), converted = -1;
    while (index < pieces) {
        const Piece piece = job.pieces[index];
        int64_t next = 0;
        if (piece.sequence != converted) {
            prepare<D>(p, static_cast<const T*>(p.q) + piece.sequence * p.q_stride, buffers.queries);
            converted = piece.sequence;
        }
        const State state(p, piece.part < 0 ? buffers.state : job.parts + piece.part * part_floats(p));
        std::memset(state.sums, 0, p.heads * padded(p.value_dim) * sizeof(float));
        for (int64_t i = 0; i < p.places(); ++i) state.maxima[i] = -__builtin_inff(), state.denominators[i] = 0.0f;
        const T* rows = kv + (p.starts[piece.sequence] + piece.first) * p.kv_stride;
        for (int64_t t = 0; t < piece.count; t += kBlock) {
            const int64_t count = piece.count - t < kBlock ? piece.count - t : kBlock;
            int64_t ahead = piece.count - t - count;
            const T* ahead_rows = rows + (t + count) * p.kv_stride;
            if (ahead == 0) {
                next = job.claim();
                if (next < pieces) {
                    const Piece& other = job.pieces[next];
                    ahead = other.count;
                    ahead_rows = kv + (p.starts[other.sequence] + other.first) * p.kv_stride;
                }
            }
            if (next >= pieces) ahead_rows = rows;
            const int64_t steps =
                tiles * ((count + kNear - 1) / kNear + (p.value_dim + 2 * P - 1) / (2 * P));
            Prefetch prefetch(ahead_rows, ahead < kBlock ? ahead : kBlock, row_bytes, p.kv_stride * sizeof(T), steps);
            attend_block<D>(p, buffers, state, rows + t * p.kv_stride, count, ahead_rows, prefetch);
        }
        if (piece.part < 0) {
            finish<D>(p, state, piece.sequence);
        } else {
            Cut& cut = job.cuts[piece.sequence];
            if (cut.left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                const State whole(p, job.parts + cut.part * part_floats(p));
                for (int64_t i = 1; i < cut.pieces; ++i)
                    merge(p, whole, State(p, job.parts + (cut.part + i) * part_floats(p)));
                finish<D>(p, whole, piece.sequence);
            }
        }
        index = next;
    }
}

static void work_on(int type, Job& job, float* scratch) {
    if (type == 0) work<Widened<F32>>(job, scratch);
    if (type == 1) work<Bfloat16>(job, scratch);
    if (type == 2) work<Widened<F16>>(job, scratch);
}
