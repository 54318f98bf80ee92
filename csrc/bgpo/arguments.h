// What both engines are told of a chunk of logits, and how it comes from Python: as addresses and sizes. The callers in
// bgpo_kernels check dtypes, shapes and strides.
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

template <typename T>
T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

inline Chunk make_chunk(uintptr_t logits, int type, int64_t rows, int64_t vocab, int64_t row_stride, uintptr_t targets,
                        uintptr_t bias, double scale, double softcap, double temperature, uintptr_t stats,
                        int64_t stats_stride) {
    return {pointer<void>(logits), static_cast<LogitType>(type), rows, vocab, row_stride,
            pointer<const int64_t>(targets), pointer<const void>(bias), scale, softcap, temperature,
            pointer<void>(stats), stats_stride};
}

}  // namespace bgpo
