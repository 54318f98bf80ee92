// What one segment (sequence b, Monte Carlo sample j) masks: first how many tokens and their weight, then which.
//
// The law over counts, every scheme's and schedule's, lives in the counts alone. Given its count, a segment masks the
// tokens with the smallest selection keys: also for Bernoulli, whose tokens below the threshold are the smallest ones.
#pragma once

#include "stream.h"

namespace bgpo {

// The law over mask counts. For kTable, `thresholds` and `weights` are the entries of this sequence's length.
struct CountLaw {
    int scheme, schedule;
    int64_t n;  // Monte Carlo samples of the whole draw
    const int64_t* thresholds;
    const float* weights;
};

struct Count {
    int64_t masked;  // tokens masked in this segment
    float weight;    // of each of them
};

// Every scheme but Bernoulli, whose count is known only after its keys are drawn.
BGPO_HD Count draw_count(const CountLaw& law, uint32_t j, int64_t sample_id, uint64_t seed, int64_t length) {
    const bool stratified = law.schedule == kStratified;
    const double full = static_cast<double>(length);
    if (law.scheme == kFull) return {length, 1.0f};
    if (law.scheme == kCoupled) {
        const uint32_t r = count_word(j & ~1u, sample_id, seed);
        const int64_t l = coupled_count(j / 2, r, length, law.n, stratified);
        const int64_t masked = j % 2 ? length - l : l;
        return {masked, masked ? ratio_weight(full + 1.0, static_cast<double>(masked)) : 0.0f};
    }
    const uint32_t r = count_word(j, sample_id, seed);
    if (law.schedule == kTable) {
        const int64_t l = table_count(law.thresholds, length, stratum(j, r));
        return {l, law.weights[l - 1]};
    }
    const int64_t l = stratified ? stratified_count(j, r, length, law.n) : uniform_count(r, length);
    return {l, ratio_weight(full, static_cast<double>(l))};
}

// Bernoulli masks where word 0 of the key is at most `last`.
struct BernoulliDraw {
    uint32_t last;
    float weight;
};

BGPO_HD BernoulliDraw draw_bernoulli(const CountLaw& law, uint32_t j, int64_t sample_id, uint64_t seed) {
    const uint32_t r = count_word(j, sample_id, seed);
    const int64_t q = bernoulli_threshold(j, r, law.n, law.schedule == kStratified);  // 1..2^32
    return {static_cast<uint32_t>(q - 1), ratio_weight(4294967296.0, static_cast<double>(q))};
}

// Which of its tokens a segment masks: the `smallest` first ones by (key, position) under the keys of sample `keys_of`,
// or all the others.
struct Selection {
    uint32_t keys_of;
    int64_t smallest;
    bool others;
};

// The second sample of a coupled pair masks what the first one leaves.
BGPO_HD Selection selection_of(bool coupled, uint32_t j, int64_t masked, int64_t length) {
    if (coupled && j % 2 == 1) return {j - 1, length - masked, true};
    return {j, masked, false};
}

}  // namespace bgpo
