// AVX-512 with products of bfloat16 pairs (AVX512_BF16).

#include "simd_avx512.h"

// As BF16, but never widened to be multiplied: sixteen pairs of elements meet in one instruction. Of every eight elements
// the first four and the last four come apart, as they do when the rows of two tokens are paired. Weights are rounded.
struct PairedBF16 : BF16 {
    static constexpr bool kPaired = true, kInterleaved = true;
    static constexpr int kRows = 2;
    using Elements = __m512i;
    using Values = __m512i;
    using Weight = __m512i;
    INLINE void load2(const T* at, V& a, V& b) {
        const __m512i zero = _mm512_setzero_si512(), whole = _mm512_loadu_si512(at);
        a = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, whole));
        b = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, whole));
    }
    INLINE void store2(T* at, V a, V b) {
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(b, a), order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
        _mm512_storeu_si512(at, _mm512_permutexvar_epi64(order, rounded));
    }
    INLINE Elements query(const float* queries, int64_t i) { return key(reinterpret_cast<const T*>(queries) + i); }
    INLINE Elements key(const T* at) { return _mm512_loadu_si512(at); }
    INLINE Elements spread(const T* at, int quarter) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 8 * quarter)));
    }
    INLINE int64_t floats(int64_t size) { return size / 2; }
    INLINE V dot(V sum, Elements a, Elements b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
    INLINE void values(const T* row, const T* other, Values& a, Values& b) {
        const __m512i one = _mm512_loadu_si512(row), two = _mm512_loadu_si512(other);
        a = _mm512_unpacklo_epi16(one, two), b = _mm512_unpackhi_epi16(one, two);
    }
    INLINE Weight weight(const float* weights, int64_t t) {
        int32_t pair;
        std::memcpy(&pair, reinterpret_cast<const T*>(weights) + t, sizeof(pair));
        return _mm512_set1_epi32(pair);
    }
    INLINE V weighted(V sum, Weight weight, Values values) { return dot(sum, weight, values); }
    // `size` floats times `factor`, in place.
    INLINE void scale(float* at, int64_t size, float factor) {
        for (int64_t i = 0; i < size; i += W) store(at + i, load(at + i) * set1(factor));
    }
    // A block's weights of one head, in place, each in half the room.
    INLINE void round_weights(float* at) {
        static_assert(kBlock == 2 * W, "one vector holds a block's rounded weights");
        _mm512_storeu_si512(at, (__m512i)_mm512_cvtne2ps_pbh(load(at + W), load(at)));
    }
};
