// Decode attention on the CPU: one query token per sequence over that sequence's rows of a KV arena.
//
// The kernel is compiled once per instruction set; which one runs is chosen when it is called. Work is cut into pieces
// of sequences, and threads take the next piece when they are done with one.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "attention_types.h"
#include "thread_pool.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the conversions of this kernel want a little-endian processor"
#endif

namespace attention {

namespace baseline {
#include "simd_baseline.h"
#include "widened.h"
using Bfloat16 = Widened<BF16>;
#include "attention_kernel.h"
}  // namespace baseline

// Clang spells the choice of a target differently; there only the baseline is built.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ATTENTION_X86
}  // namespace attention
#include <cpuid.h>
#include <immintrin.h>
namespace attention {

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include "simd_avx2.h"
#include "widened.h"
using Bfloat16 = Widened<BF16>;
#include "attention_kernel.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#include "simd_avx512.h"
#include "widened.h"
using Bfloat16 = Widened<BF16>;
#include "attention_kernel.h"
}  // namespace avx512
#pragma GCC pop_options

#if __GNUC__ >= 11  // older ones do not know these instructions, or how to ask for them
#define ATTENTION_BF16
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
namespace avx512_bf16 {
#include "simd_avx512_bf16.h"
#include "widened.h"
using Bfloat16 = PairedBF16;
#include "attention_kernel.h"
}  // namespace avx512_bf16
#pragma GCC pop_options
#endif
#endif

// 0: baseline, 1: AVX2, 2: AVX-512, 3: AVX-512 with products of bfloat16.
static int find_variant() {
#ifdef ATTENTION_X86
    unsigned a, b, c, d;
    const bool half = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    if (!half || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return 1;
#ifdef ATTENTION_BF16
    if (__builtin_cpu_supports("avx512bf16")) return 3;
#endif
    return 2;
#else
    return 0;
#endif
}

// Asked once: under a hypervisor the processor takes long to say what it is.
static int best_variant() {
    static const int variant = find_variant();
    return variant;
}

// Floats that one thread keeps from call to call.
class Scratch {
  public:
    ~Scratch() { std::free(data_); }
    // Null if there is no memory.
    float* floats(int64_t count) {
        if (count > size_) {
            std::free(data_);
            const size_t bytes = (count * sizeof(float) + kCacheLine - 1) / kCacheLine * kCacheLine;
            data_ = static_cast<float*>(std::aligned_alloc(kCacheLine, bytes));
            size_ = data_ ? count : 0;
        }
        return data_;
    }

  private:
    float* data_ = nullptr;
    int64_t size_ = 0;
};

static thread_local Scratch buffers_of_thread, parts_of_caller;

struct Call {
    Job& job;
    int type, variant;
};

static void help(void* context) {
    Call& call = *static_cast<Call*>(context);
    float* scratch = buffers_of_thread.floats(Buffers::floats(call.job.problem));
    if (!scratch) return;  // the caller has its own already and does this thread's share
#ifdef ATTENTION_X86
#ifdef ATTENTION_BF16
    if (call.variant == 3) return avx512_bf16::work_on(call.type, call.job, scratch);
#endif
    if (call.variant == 2) return avx512::work_on(call.type, call.job, scratch);
    if (call.variant == 1) return avx2::work_on(call.type, call.job, scratch);
#endif
    baseline::work_on(call.type, call.job, scratch);
}

// Pieces of about equal work, several per thread; whole sequences where there are enough of them.
static int64_t cut_up(const Problem& p, int64_t threads, std::vector<Piece>& pieces, std::vector<Cut>& cuts) {
    constexpr int64_t kPiecesPerThread = 8, kLeast = 2 * kBlock;
    int64_t tokens = 0, parts = 0;
    for (int64_t s = 0; s < p.n; ++s) tokens += p.lengths[s];
    int64_t most = tokens + 1;
    if (threads > 1) {
        most = (tokens / (threads * kPiecesPerThread) + kBlock) / kBlock * kBlock;
        most = most < kLeast ? kLeast : most;
    }
    for (int64_t s = 0; s < p.n; ++s) {
        const int64_t length = p.lengths[s], count = (length + most - 1) / most;
        if (count <= 1) {
            if (length > 0) pieces.push_back({s, 0, length, -1});
            continue;
        }
        cuts[s].part = parts;
        const int64_t size = ((length + count - 1) / count + kBlock - 1) / kBlock * kBlock;
        int64_t made = 0;
        for (int64_t first = 0; first < length; first += size, ++made)
            pieces.push_back({s, first, length - first < size ? length - first : size, parts++});
        cuts[s].pieces = made, cuts[s].left = made;
    }
    return parts;
}

}  // namespace attention

using namespace attention;

extern "C" int hrm_attention_variant() { return best_variant(); }

// 0, or: 1 a sequence lies outside the arena, 2 no memory.
extern "C" int hrm_decode_attention(const void* q, const void* kv, void* out, const int64_t* starts,
                                    const int64_t* lengths, const float* sinks, const int64_t* sizes, float scale) {
    enum { kN, kHeads, kKvHeads, kKeyDim, kValueDim, kValueOffset, kQStride, kKvStride, kOutStride, kCapacity,
           kType, kVariant, kThreads };
    const Problem problem{q, kv, out, starts, lengths, sinks, sizes[kN], sizes[kHeads], sizes[kKvHeads],
                          sizes[kKeyDim], sizes[kValueDim], sizes[kValueOffset], sizes[kQStride], sizes[kKvStride],
                          sizes[kOutStride], scale};
    const int64_t capacity = sizes[kCapacity];
    const size_t element = sizes[kType] == 0 ? 4 : 2;
    for (int64_t s = 0; s < problem.n; ++s)
        if (lengths[s] < 0 || starts[s] < 0 || starts[s] > capacity || lengths[s] > capacity - starts[s]) return 1;
    for (int64_t s = 0; s < problem.n; ++s)
        if (lengths[s] == 0)
            std::memset(static_cast<char*>(out) + s * problem.out_stride * element, 0,
                        problem.heads * problem.value_dim * element);
    try {
        std::vector<Piece> pieces;
        std::vector<Cut> cuts(problem.n);
        const int64_t parts = cut_up(problem, sizes[kThreads], pieces, cuts);
        float* at = parts ? parts_of_caller.floats(parts * part_floats(problem)) : nullptr;
        if ((parts && !at) || !buffers_of_thread.floats(Buffers::floats(problem))) return 2;
        Job job{problem, pieces, cuts, at};
        const int64_t count = pieces.size(), threads = sizes[kThreads] < count ? sizes[kThreads] : count;
        const int best = best_variant(), variant = sizes[kVariant] < best ? static_cast<int>(sizes[kVariant]) : best;
        Call call{job, static_cast<int>(sizes[kType]), variant};
        pool::run(threads, help, &call);
    } catch (const std::bad_alloc&) {
        return 2;
    }
    return 0;
}
