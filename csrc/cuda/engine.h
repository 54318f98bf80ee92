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

// Samples lo..hi-1 of the n of each sequence.
struct DrawArgs {
    const int64_t* input_ids;      // [batch, tokens]
    const uint8_t* response_mask;  // [batch, tokens]
    const uint8_t* prompt_mask;    // [batch, tokens] or null
    const int64_t* sample_ids;     // [batch]
    int64_t batch, tokens, n, lo, hi;
    uint64_t seed;
    int scheme, schedule;
    const int64_t* thresholds;     // count tables, or null
    const float* table_weights;
    const int64_t* table_start;    // [batch]
    int64_t mask_token_id;
    int64_t prompt_threshold;
};

struct DrawResult {
    int64_t *noisy, *rows, *targets;  // [batch, hi - lo, tokens], [N], [N]
    int32_t* count;                   // [batch, hi - lo]
    float* weight;                    // [batch, hi - lo]
    int64_t* offsets;                 // [batch * (hi - lo) + 1]
};

// Segments of a chunk whose first row is row `begin` of all, and the bound's inputs. T: fp32, or fp64 for fp64 logits.
struct ChunkSegments {
    const int64_t* offsets;  // [segments + 1], rows of all, of which the chunk holds those from `begin` on
    const float* weight;     // [segments]
    int64_t segments, begin;
    const void* advantages;  // [B] T; segment s belongs to sequence (first + s) / samples
    const void* old;         // [B * samples] T, or null: on-policy
    const float* length;     // [B] or null
    int64_t first, samples;
    Clip clip;
    double divisor;
    void* sums;        // [segments] T out
    void* row_grad;    // [rows] T out: d loss / d log-probability
};

void row_statistics(const Queue& queue, const Chunk& chunk, bool entropy);
void dlogits(const Queue& queue, const Chunk& chunk, const void* grad_logprob, const void* grad_entropy, LogitType out);
// The gradient of BGPO's loss: everything between the statistics and the GEMMs.
void bound_dlogits(const Queue& queue, const Chunk& chunk, const ChunkSegments& segments, LogitType out);
// `state`: batch * (hi - lo) + 1 words.
void draw_masks(const Queue& queue, const DrawArgs& args, const DrawResult& result, uint64_t* state);
template <typename T>
void segment_sum(const Queue& queue, const T* values, const int64_t* offsets, const float* weight, int64_t segments,
                 T* out);
template <typename T>
void bound(const Queue& queue, const T* logprob, const T* advantages, const T* old, const float* length,
           int64_t batch, int64_t n, const Clip& clip, T* term, T* slope);

// Devices the driver offers; 0 without a driver.
int device_count();
// Toolkit that built the kernels, 1000 * major + 10 * minor.
int toolkit_version();

}  // namespace bgpo::cuda
