// A data type whose elements are widened to floats before they are multiplied.
template <class S>
struct Widened : S {
    using T = typename S::T;
    static constexpr bool kPaired = false, kInterleaved = kInterleaves<S>;
    static constexpr int kRows = 1;  // rows of values that are weighted at once
    struct Elements {
        V a, b;
    };
    using Values = V;
    using Weight = V;
    INLINE Elements query(const float* queries, int64_t i) { return {load(queries + i), load(queries + i + W)}; }
    INLINE Elements key(const T* at) {
        Elements both;
        S::load2(at, both.a, both.b);
        return both;
    }
    // A quarter of a vector of keys, four times over.
    INLINE Elements spread(const T* at, int quarter) {
        Elements both;
        S::spread2(at, quarter, both.a, both.b);
        return both;
    }
    // Room for `size` elements of a query.
    INLINE int64_t floats(int64_t size) { return size; }
    INLINE V dot(V sum, const Elements& q, const Elements& k) { return fma(q.b, k.b, fma(q.a, k.a, sum)); }
    INLINE void values(const T* row, const T*, V& a, V& b) { S::load2(row, a, b); }
    INLINE V weight(const float* weights, int64_t t) { return set1(weights[t]); }
    INLINE V weighted(V sum, V weight, V values) { return fma(weight, values, sum); }
};
