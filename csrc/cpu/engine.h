// The CPU engine's entry points. The kernels are compiled once per instruction set (see kernels.cpp) and chosen at load.
#pragma once

#include <cstdint>

#include "../bgpo/arguments.h"
#include "../bgpo/bound.h"

namespace bgpo::cpu {

// Where a response lies in its row: nearly always one run, and then loads and stores vectorise.
struct Response {
    int64_t length, first;
    const int64_t* index;  // null for a run, else the index in T of every response token

    bool contiguous() const { return index == nullptr; }
    int64_t operator[](int64_t p) const { return index ? index[p] : first + p; }
};

// What a draw's inputs must not hold, and what it needs to know of them.
struct Facts {
    int64_t lowest = INT64_MAX, highest = INT64_MIN;  // of all ids
    int64_t largest_response = 0;                     // of the response's ids
    bool held = false, overlap = false;               // the response holds the mask token; meets the prompt mask
};

// Samples lo..hi-1 of the n of each sequence.
struct CountArgs {
    const int64_t* lengths;     // [batch], response tokens
    const int64_t* sample_ids;  // [batch]
    int64_t batch, n, lo, hi;
    uint64_t seed;
    int scheme, schedule;
    const int64_t* thresholds;  // count tables, or null
    const float* table_weights;
    const int64_t* table_start;  // [batch]
};

struct DrawArgs {
    const int64_t* input_ids;    // [batch, tokens]
    const Response* responses;   // [batch]
    const uint8_t* prompt_mask;  // [batch, tokens] or null
    const int64_t* sample_ids;   // [batch]
    const int64_t* offsets;      // [batch * (hi - lo) + 1]: where each segment's rows go
    int64_t batch, tokens, lo, hi;
    uint64_t seed;
    int64_t mask_token_id;
    bool coupled;
    int64_t prompt_threshold;
};

struct Kernels {
    const char* name;
    void (*row_statistics)(const Chunk&, bool entropy, int threads);
    void (*dlogits)(const Chunk&, const void* grad_logprob, const void* grad_entropy, int threads);
    Facts (*input_facts)(const int64_t* input_ids, const uint8_t* response_mask, const uint8_t* prompt_mask,
                         int64_t batch, int64_t tokens, int64_t mask_token_id, int64_t* lengths);
    void (*draw_counts)(const CountArgs&, int32_t* count, float* weight, int64_t* offsets, int threads);
    void (*draw_masks)(const DrawArgs&, int64_t* noisy, int64_t* rows, int64_t* targets, int threads);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

template <typename T>
void segment_sum(const T* values, const int64_t* offsets, const float* weight, int64_t segments, T* out);
template <typename T>
void bound(const T* logprob, const T* advantages, const T* old, const float* length, int64_t batch, int64_t n,
           const Clip& clip, T* term, T* slope);

}  // namespace bgpo::cpu
