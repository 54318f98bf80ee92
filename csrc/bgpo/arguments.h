// What both engines are told of a chunk of logits and of a draw's counts, and how it comes from Python: as addresses and
// sizes. The callers in bgpo_kernels check dtypes, shapes and strides.
#pragma once

#include <cstdint>

namespace bgpo {

// kHalf on CUDA only: a CPU computes fp16 models in fp32.
enum class LogitType : int { kFloat = 0, kBFloat16 = 1, kDouble = 2, kHalf = 3 };

// One chunk of logits [rows, vocab] with unit column stride; rows may begin at any multiple of the element size.
struct Chunk {
    void* logits;
    LogitType type;
    int64_t rows, vocab, row_stride;
    const int64_t* targets;
    const void* bias;  // [vocab] fp32 (fp64 for fp64 logits), or null
    double scale, softcap, temperature;
    void* stats;  // [4, stats_stride]: max, sum, logprob, entropy; fp32 (fp64 for fp64 logits)
    int64_t stats_stride;
};

// Samples lo..hi-1 of the n of each sequence.
struct CountArgs {
    const uint8_t* response_mask;  // [batch, tokens]
    const int64_t* sample_ids;     // [batch]
    int64_t batch, tokens, n, lo, hi;
    uint64_t seed;
    int scheme, schedule;
    const int64_t* thresholds;     // count tables, or null
    const float* table_weights;
    const int64_t* table_start;    // [batch]
};

template <typename T>
T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

inline Chunk make_chunk(uintptr_t logits, int type, int64_t rows, int64_t vocab, int64_t row_stride, uintptr_t targets,
                        uintptr_t bias, double scale, double softcap, double temperature, uintptr_t stats,
                        int64_t stats_stride) {
    return {pointer<void>(logits), static_cast<LogitType>(type), rows, vocab, row_stride,
            pointer<const int64_t>(targets), pointer<const void>(bias), scale, softcap, temperature,
            pointer<void>(stats), stats_stride};
}

inline CountArgs make_counts(uintptr_t response_mask, uintptr_t sample_ids, int64_t batch, int64_t tokens, int64_t n,
                             int64_t lo, int64_t hi, uint64_t seed, int scheme, int schedule, uintptr_t thresholds,
                             uintptr_t table_weights, uintptr_t table_start) {
    return {pointer<const uint8_t>(response_mask), pointer<const int64_t>(sample_ids), batch, tokens, n, lo, hi, seed,
            scheme, schedule, pointer<const int64_t>(thresholds), pointer<const float>(table_weights),
            pointer<const int64_t>(table_start)};
}

}  // namespace bgpo
