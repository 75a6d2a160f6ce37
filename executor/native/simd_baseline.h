// Vectors of four floats in the compiler's own vector types: any processor (little-endian).

typedef float V __attribute__((vector_size(16)));
typedef int32_t VI __attribute__((vector_size(16)));
typedef uint32_t VU __attribute__((vector_size(16)));
constexpr int W = 4;
constexpr int kHeads = 2;  // heads whose sums are kept in registers at once

INLINE V set1(float x) { return V{x, x, x, x}; }
INLINE V load(const float* at) {
    V v;
    std::memcpy(&v, at, sizeof v);
    return v;
}
INLINE void store(float* at, V v) { std::memcpy(at, &v, sizeof v); }
INLINE V fma(V a, V b, V c) { return a * b + c; }
INLINE V maximum(V a, V b) { return a > b ? a : b; }  // b where either is not a number

// Sums of four vectors, to four floats.
INLINE void sums4(V a, V b, V c, V d, float* out) {
    const V ab = __builtin_shuffle(a, b, VI{0, 4, 1, 5}) + __builtin_shuffle(a, b, VI{2, 6, 3, 7});
    const V cd = __builtin_shuffle(c, d, VI{0, 4, 1, 5}) + __builtin_shuffle(c, d, VI{2, 6, 3, 7});
    store(out, __builtin_shuffle(ab, cd, VI{0, 1, 4, 5}) + __builtin_shuffle(ab, cd, VI{2, 3, 6, 7}));
}

// Maxima of four vectors, to four floats.
INLINE void maxima4(V a, V b, V c, V d, float* out) {
    const V ab = maximum(__builtin_shuffle(a, b, VI{0, 4, 1, 5}), __builtin_shuffle(a, b, VI{2, 6, 3, 7}));
    const V cd = maximum(__builtin_shuffle(c, d, VI{0, 4, 1, 5}), __builtin_shuffle(c, d, VI{2, 6, 3, 7}));
    store(out, maximum(__builtin_shuffle(ab, cd, VI{0, 1, 4, 5}), __builtin_shuffle(ab, cd, VI{2, 3, 6, 7})));
}

// (x rounded, 2^(x rounded)); x between -126 and 127.
INLINE V rounded(V x, V& power) {
    const V magic = set1(12582912.0f);  // 1.5 * 2^23: adding it leaves no bits behind the point
    const V shifted = x + magic;
    power = (V)(((VI)shifted - (VI)magic + 127) << 23);
    return shifted - magic;
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
        VU pairs;
        std::memcpy(&pairs, at, sizeof pairs);
        a = (V)(pairs << 16);
        b = (V)(pairs & 0xffff0000u);
    }
    INLINE VU upper(V v) {  // rounded to nearest even
        const VU bits = (VU)v;
        const VU up = bits + 0x7fffu + ((bits >> 16) & 1u);
        return (VU)(v != v ? (VI)(bits | 0x400000u) : (VI)up);
    }
    INLINE void store2(T* at, V a, V b) {
        const VU pairs = (upper(a) >> 16) | (upper(b) & 0xffff0000u);
        std::memcpy(at, &pairs, sizeof pairs);
    }
};

struct F16 {
    using T = uint16_t;
    INLINE float widen(uint32_t half) {
        const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
        uint32_t bits = (magnitude << 13) + (112u << 23);
        if (magnitude >= 0x7c00u) bits += 112u << 23;  // infinite or not a number
        float x;
        std::memcpy(&x, &bits, sizeof x);
        if (magnitude < 0x400u) x = magnitude * 0x1p-24f;  // denormal
        std::memcpy(&bits, &x, sizeof x);
        bits |= sign;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    }
    INLINE uint16_t narrow(float x) {  // rounded to nearest even
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof x);
        const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
        if (magnitude > 0x7f800000u) return sign | 0x7e00u;
        if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
        if (magnitude < 0x38800000u) {                        // denormal: let the adder round
            float y, half = 0.5f;
            std::memcpy(&y, &magnitude, sizeof y);
            y += half;
            uint32_t low;
            std::memcpy(&low, &y, sizeof y);
            return sign | (low - 0x3f000000u);
        }
        return sign | ((magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
    }
    INLINE void load2(const T* at, V& a, V& b) {
        for (int i = 0; i < W; ++i) a[i] = widen(at[i]), b[i] = widen(at[i + W]);
    }
    INLINE void store2(T* at, V a, V b) {
        for (int i = 0; i < W; ++i) at[i] = narrow(a[i]), at[i + W] = narrow(b[i]);
    }
};

// Whether groups of kMany heads are taken together; their sums would not fit into the registers.
template <class D>
constexpr bool kInterleaves = false;
