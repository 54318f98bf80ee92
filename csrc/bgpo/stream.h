// Mask stream, version 1: which random words decide what, and the integer laws over mask counts.
//
//   counter = (position, j, sample_id low 32, (sample_id >> 32 & 0xFFFFFF) | purpose << 24), key = seed
//
// position is the rank of a token inside its response (the index in T for prompt tokens, 0 for counts), j the Monte
// Carlo sample. Masks therefore depend on logical coordinates alone. Changing any line below is a new stream version.
#pragma once

#include "philox.h"

namespace bgpo {

enum Purpose : uint32_t { kSelectionKeys = 0, kCounts = 1, kPromptTokens = 2 };
enum Scheme : int { kExact = 0, kBernoulli = 1, kCoupled = 2, kFull = 3 };
enum Schedule : int { kUniform = 0, kStratified = 1, kTable = 2 };

BGPO_HD Words stream_counter(uint32_t position, uint32_t j, int64_t sample_id, Purpose purpose) {
    const uint64_t id = static_cast<uint64_t>(sample_id);
    const uint32_t high = (static_cast<uint32_t>(id >> 32) & 0xFFFFFFu) | (static_cast<uint32_t>(purpose) << 24);
    return {position, j, static_cast<uint32_t>(id), high};
}

BGPO_HD Words stream_words(uint32_t position, uint32_t j, int64_t sample_id, Purpose purpose, uint64_t seed) {
    return philox(stream_counter(position, j, sample_id, purpose), seed);
}

BGPO_HD uint64_t selection_key(const Words& w) { return (static_cast<uint64_t>(w.x) << 32) | w.y; }

BGPO_HD uint32_t count_word(uint32_t j, int64_t sample_id, uint64_t seed) {
    return stream_words(0, j, sample_id, kCounts, seed).x;
}

// u_j = (j << 32) + r_j: a uniform point of stratum j on the grid of n << 32.
BGPO_HD int64_t stratum(uint32_t j, uint32_t r) { return (static_cast<int64_t>(j) << 32) + r; }

BGPO_HD int64_t uniform_count(uint32_t r, int64_t length) { return 1 + ((static_cast<int64_t>(r) * length) >> 32); }

BGPO_HD int64_t stratified_count(uint32_t j, uint32_t r, int64_t length, int64_t n) {
    return 1 + stratum(j, r) * length / (n << 32);
}

// Smallest l whose threshold exceeds u: thresholds[l - 1] = ceil(cumulative(l) * (n << 32)), ascending.
BGPO_HD int64_t table_count(const int64_t* thresholds, int64_t length, int64_t u) {
    int64_t lo = 0, hi = length - 1;
    while (lo < hi) {
        const int64_t mid = (lo + hi) >> 1;
        if (thresholds[mid] > u) hi = mid; else lo = mid + 1;
    }
    return lo + 1;
}

// Coupled pairs: sample 2i masks l of 0..L tokens, sample 2i + 1 the others. `r` is the word of sample 2i.
BGPO_HD int64_t coupled_count(uint32_t pair, uint32_t r, int64_t length, int64_t n, bool stratified) {
    if (!stratified) return (static_cast<int64_t>(r) * (length + 1)) >> 32;
    return stratum(pair, r) * (length + 1) / ((n / 2) << 32);
}

// Bernoulli: t = q / 2^32 in (0, 1]; a token is masked where word 0 of its key is below q.
BGPO_HD int64_t bernoulli_threshold(uint32_t j, uint32_t r, int64_t n, bool stratified) {
    if (!stratified) return static_cast<int64_t>(r) + 1;
    const int64_t q = (stratum(j, r) + 1) / n;
    return q < 1 ? 1 : q;
}

// fp32 weights, divided in fp64 so that every backend rounds once from the same number.
BGPO_HD float ratio_weight(double numerator, double denominator) {
    return static_cast<float>(numerator / denominator);
}

}  // namespace bgpo
