// The CUDA kernels' entry points: plain structs of device pointers, an int for the device and a stream handle. Nothing
// here needs the CUDA headers, so module.cpp stays ordinary C++.
#pragma once

#include <cstdint>

#include "../bgpo/arguments.h"
#include "../bgpo/bound.h"

namespace bgpo::cuda {

// Where a kernel runs. The handle is a cudaStream_t of any CUDA runtime in the process: all share the driver's streams.
struct Queue {
    int device;
    void* stream;
};

struct DrawArgs {
    const int64_t* input_ids;      // [batch, tokens]
    const uint8_t* response_mask;  // [batch, tokens]
    const uint8_t* prompt_mask;    // [batch, tokens] or null
    const int64_t* sample_ids;     // [batch]
    const int64_t* offsets;        // [batch * (hi - lo) + 1]: where each segment's rows go
    int64_t batch, tokens, lo, hi;
    uint64_t seed;
    int64_t mask_token_id;
    bool coupled;
    int64_t prompt_threshold;
};

void row_statistics(const Queue& queue, const Chunk& chunk, bool entropy);
void dlogits(const Queue& queue, const Chunk& chunk, const void* grad_logprob, const void* grad_entropy, LogitType out);
void draw_counts(const Queue& queue, const CountArgs& args, int32_t* count, float* weight);
void draw_masks(const Queue& queue, const DrawArgs& args, int64_t* noisy, int64_t* rows, int64_t* targets);
template <typename T>
void segment_sum(const Queue& queue, const T* values, const int64_t* offsets, const float* weight, int64_t segments,
                 T* out);
template <typename T>
void bound(const Queue& queue, const T* logprob, const float* advantages, const T* old, const float* length,
           int64_t batch, int64_t n, const Clip& clip, T* term, T* slope);

// Devices the driver offers; 0 without a driver.
int device_count();
// Toolkit that built the kernels, 1000 * major + 10 * minor.
int toolkit_version();

}  // namespace bgpo::cuda
