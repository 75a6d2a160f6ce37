// Vectors of eight floats: AVX2, FMA and F16C.

typedef __m256 V;
constexpr int W = 8;
constexpr int kHeads = 2;  // heads whose sums are kept in registers at once

INLINE V set1(float x) { return _mm256_set1_ps(x); }
INLINE V load(const float* at) { return _mm256_loadu_ps(at); }
INLINE void store(float* at, V v) { _mm256_storeu_ps(at, v); }
INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
INLINE V maximum(V a, V b) { return _mm256_max_ps(a, b); }  // b where either is not a number
INLINE __m128 folded(V v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }

// Sums of four vectors, to four floats.
INLINE V low_sums(V a, V b) { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); }
INLINE void sums4(V a, V b, V c, V d, float* out) {
    const __m256d ab = _mm256_castps_pd(low_sums(a, b)), cd = _mm256_castps_pd(low_sums(c, d));
    const V abcd =
        _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
    _mm_storeu_ps(out, folded(abcd));
}

// Maxima of four vectors, to four floats.
INLINE V low_maxima(V a, V b) { return _mm256_max_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); }
INLINE void maxima4(V a, V b, V c, V d, float* out) {
    const __m256d ab = _mm256_castps_pd(low_maxima(a, b)), cd = _mm256_castps_pd(low_maxima(c, d));
    const V abcd =
        _mm256_max_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
    _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}

// (x rounded, 2^(x rounded)); x between -126 and 127.
INLINE V rounded(V x, V& power) {
    const V whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    power = _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23));
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
    INLINE void load2(const T* at, V& a, V& b) {
        __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        asm("" : "+x"(pairs));  // one load, not one for each half
        a = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        b = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    }
    INLINE __m256i upper(V v) {  // rounded to nearest even
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd));
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        return _mm256_blendv_epi8(up, quiet, nan);
    }
    INLINE void store2(T* at, V a, V b) {
        const __m256i high = _mm256_and_si256(upper(b), _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm256_or_si256(_mm256_srli_epi32(upper(a), 16), high));
    }
};

struct F16 {
    using T = uint16_t;
    INLINE void load2(const T* at, V& a, V& b) {
        a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
        b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + W)));
    }
    INLINE void store2(T* at, V a, V b) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at + W), _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
    }
};

// Whether groups of kMany heads are taken together; their sums would not fit into the registers.
template <class D>
constexpr bool kInterleaves = false;
