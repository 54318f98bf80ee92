// What one segment (sequence b, Monte Carlo sample j) masks: how many tokens, whose keys decide, and the token weight.
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
    int64_t masked;   // tokens masked in this segment
    int64_t drawn;    // l: how many of the smallest keys are selected
    bool complement;  // mask the others instead
    float weight;
};

// Every scheme but Bernoulli, whose count is known only after its keys are drawn.
BGPO_HD Count draw_count(const CountLaw& law, uint32_t j, int64_t sample_id, uint64_t seed, int64_t length) {
    const bool stratified = law.schedule == kStratified;
    const double full = static_cast<double>(length);
    if (law.scheme == kFull) return {length, length, false, 1.0f};
    if (law.scheme == kCoupled) {
        const uint32_t r = count_word(j & ~1u, sample_id, seed);
        const int64_t l = coupled_count(j / 2, r, length, law.n, stratified);
        const int64_t masked = j % 2 ? length - l : l;
        return {masked, l, j % 2 == 1, masked ? ratio_weight(full + 1.0, static_cast<double>(masked)) : 0.0f};
    }
    const uint32_t r = count_word(j, sample_id, seed);
    if (law.schedule == kTable) {
        const int64_t l = table_count(law.thresholds, length, stratum(j, r));
        return {l, l, false, law.weights[l - 1]};
    }
    const int64_t l = stratified ? stratified_count(j, r, length, law.n) : uniform_count(r, length);
    return {l, l, false, ratio_weight(full, static_cast<double>(l))};
}

struct BernoulliDraw {
    int64_t threshold;  // q in 1..2^32: masked where word 0 of the key is below
    float weight;
};

BGPO_HD BernoulliDraw draw_bernoulli(const CountLaw& law, uint32_t j, int64_t sample_id, uint64_t seed) {
    const uint32_t r = count_word(j, sample_id, seed);
    const int64_t q = bernoulli_threshold(j, r, law.n, law.schedule == kStratified);
    return {q, ratio_weight(4294967296.0, static_cast<double>(q))};
}

// The sample whose keys decide: the odd sample of a coupled pair uses its partner's.
BGPO_HD uint32_t key_sample(const Count& c, uint32_t j) { return c.complement ? j - 1 : j; }

}  // namespace bgpo
