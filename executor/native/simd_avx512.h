// Vectors of sixteen floats: AVX-512 F, BW, DQ and VL.

typedef __m512 V;
constexpr int W = 16;
constexpr int kHeads = 4;  // heads whose sums are kept in registers at once

INLINE V set1(float x) { return _mm512_set1_ps(x); }
INLINE V load(const float* at) { return _mm512_loadu_ps(at); }
INLINE void store(float* at, V v) { _mm512_storeu_ps(at, v); }
INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE V maximum(V a, V b) { return _mm512_max_ps(a, b); }  // b where either is not a number

// Sums of four vectors, to four floats.
INLINE V low_sums(V a, V b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
INLINE void sums4(V a, V b, V c, V d, float* out) {
    const __m512d ab = _mm512_castps_pd(low_sums(a, b)), cd = _mm512_castps_pd(low_sums(c, d));
    const V abcd =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

// Maxima of four vectors, to four floats.
INLINE V low_maxima(V a, V b) { return _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
INLINE void maxima4(V a, V b, V c, V d, float* out) {
    const __m512d ab = _mm512_castps_pd(low_maxima(a, b)), cd = _mm512_castps_pd(low_maxima(c, d));
    const V abcd =
        _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

// (x rounded, 2^(x rounded)); x between -126 and 127.
INLINE V rounded(V x, V& power) {
    const V whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    power = _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(whole), _mm512_set1_epi32(127)), 23));
    return whole;
}

struct F32 {
    using T = float;
    INLINE void load2(const T* at, V& a, V& b) { a = load(at), b = load(at + W); }
    INLINE void store2(T* at, V a, V b) { store(at, a), store(at + W, b); }
};

// Elements of even and of odd index come apart: the upper half of a float is a bfloat16.
struct BF16 {
    using T = uint16_t;
    INLINE void widen(__m512i pairs, V& a, V& b) {
        asm("" : "+v"(pairs));  // one load, not one for each half: they are what these processors run short of
        a = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        b = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    }
    INLINE void load2(const T* at, V& a, V& b) { widen(_mm512_loadu_si512(at), a, b); }
    // The j-th quarters of what load2 gives, each four times over.
    INLINE void spread2(const T* at, int j, V& a, V& b) {
        widen(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 8 * j))), a, b);
    }
    // The j-th quarter of the i-th vector becomes the i-th quarter of the j-th vector.
    INLINE void interleave4(V& a, V& b, V& c, V& d) {
        const V ab = _mm512_shuffle_f32x4(a, b, 0x44), ab_high = _mm512_shuffle_f32x4(a, b, 0xee);
        const V cd = _mm512_shuffle_f32x4(c, d, 0x44), cd_high = _mm512_shuffle_f32x4(c, d, 0xee);
        a = _mm512_shuffle_f32x4(ab, cd, 0x88), b = _mm512_shuffle_f32x4(ab, cd, 0xdd);
        c = _mm512_shuffle_f32x4(ab_high, cd_high, 0x88), d = _mm512_shuffle_f32x4(ab_high, cd_high, 0xdd);
    }
    // Sums of the quarters of four vectors; those of the i-th quarters go to row i.
    INLINE void quarter_sums4(V a, V b, V c, V d, float* rows, int64_t stride) {
        const V ab = _mm512_shuffle_ps(a, b, 0x88) + _mm512_shuffle_ps(a, b, 0xdd);
        const V cd = _mm512_shuffle_ps(c, d, 0x88) + _mm512_shuffle_ps(c, d, 0xdd);
        const V abcd = _mm512_shuffle_ps(ab, cd, 0x88) + _mm512_shuffle_ps(ab, cd, 0xdd);
        _mm_storeu_ps(rows, _mm512_castps512_ps128(abcd));
        _mm_storeu_ps(rows + stride, _mm512_extractf32x4_ps(abcd, 1));
        _mm_storeu_ps(rows + 2 * stride, _mm512_extractf32x4_ps(abcd, 2));
        _mm_storeu_ps(rows + 3 * stride, _mm512_extractf32x4_ps(abcd, 3));
    }
    INLINE __m512i upper(V v) {  // rounded to nearest even
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd));
        const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
        return _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
    }
    INLINE void store2(T* at, V a, V b) {
        const __m512i high = _mm512_and_si512(upper(b), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
        _mm512_storeu_si512(at, _mm512_or_si512(_mm512_srli_epi32(upper(a), 16), high));
    }
};

struct F16 {
    using T = uint16_t;
    INLINE void load2(const T* at, V& a, V& b) {
        const __m512i halves = _mm512_loadu_si512(at);
        a = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
        b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    }
    INLINE void store2(T* at, V a, V b) {
        const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
        _mm512_storeu_si512(at, _mm512_inserti64x4(low, _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT), 1));
    }
};

// Whether groups of kMany heads are taken together, with interleaved queries. Of floats twice as much would be loaded
// for every multiplication.
template <class D>
constexpr bool kInterleaves = false;
template <>
constexpr bool kInterleaves<BF16> = true;
