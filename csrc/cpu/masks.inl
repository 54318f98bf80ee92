// Random masking: keys, selection and noisy ids, one segment (sequence b, sample j) per task; then the row lists.
//
// select     per segment: L Philox calls (vectorised over positions), 2-3 radix passes over L keys in L1/L2, T writes.
// emit_rows  per segment: one look at its L response positions.
// No floating point but the fp32 weight; no state; any split over threads gives the same bits.

#include "../bgpo/draw.h"
#include "../bgpo/select.h"
#include "philox_lanes.h"

namespace bgpo::cpu {
namespace {

// Per-thread buffers, plain arrays: a standard container instantiated here would be compiled once per instruction set
// and the linker would keep any one of the copies.
struct Scratch {
    uint64_t* keys;
    uint64_t* candidates;

    explicit Scratch(int64_t size) : keys(new uint64_t[2 * size]), candidates(keys + size) {}
    ~Scratch() { delete[] keys; }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

// Threshold of the `count` smallest keys (count >= 1). After the first pass only the candidates are looked at.
SelectionThreshold threshold_of(const Scratch& s, int64_t length, int64_t count) {
    RadixState state;
    state.remaining = static_cast<uint32_t>(count);
    uint32_t histogram[kRadixSize] = {};
    for (int64_t p = 0; p < length; ++p) ++histogram[radix_digit(state, s.keys[p])];
    radix_advance(state, histogram);
    int64_t candidates = 0;
    for (int64_t p = 0; p < length && !state.done; ++p) {
        s.candidates[candidates] = s.keys[p];
        candidates += radix_matches(state, s.keys[p]);
    }
    while (!state.done) {
        std::memset(histogram, 0, sizeof(histogram));
        for (int64_t i = 0; i < candidates; ++i)
            if (radix_matches(state, s.candidates[i])) ++histogram[radix_digit(state, s.candidates[i])];
        radix_advance(state, histogram);
    }
    return radix_threshold(state);
}

CountLaw law_of(const DrawArgs& a, int64_t b) {
    const int64_t at = a.schedule == kTable ? a.table_start[b] : 0;
    return {a.scheme, a.schedule, a.n, a.thresholds + at, a.table_weights + at};
}

void mask_bernoulli(const DrawArgs& a, int64_t b, uint32_t j, int64_t length, const int64_t* where, Scratch& s,
                    int64_t* noisy, int32_t& count, float& weight) {
    const BernoulliDraw draw = draw_bernoulli(law_of(a, b), j, a.sample_ids[b], a.seed);
    make_keys(length, j, a.sample_ids[b], a.seed, s.keys);
    int32_t masked = 0;
    for (int64_t p = 0; p < length; ++p)
        if (static_cast<int64_t>(s.keys[p] >> 32) < draw.threshold) {
            noisy[where[p]] = a.mask_token_id;
            ++masked;
        }
    count = masked;
    weight = draw.weight;
}

void mask_selected(const DrawArgs& a, int64_t b, uint32_t j, int64_t length, const int64_t* where, Scratch& s,
                   int64_t* noisy, const Count& c) {
    if (c.masked == 0) return;
    if (c.masked == length) {
        for (int64_t p = 0; p < length; ++p) noisy[where[p]] = a.mask_token_id;
        return;
    }
    make_keys(length, key_sample(c, j), a.sample_ids[b], a.seed, s.keys);
    const SelectionThreshold t = threshold_of(s, length, c.drawn);
    uint32_t ties = t.ties;
    for (int64_t p = 0; p < length; ++p) {
        bool selected = s.keys[p] < t.key;
        if (s.keys[p] == t.key && ties > 0) {
            selected = true;
            --ties;
        }
        int64_t& id = noisy[where[p]];
        id = selected != c.complement ? a.mask_token_id : id;
    }
}

void mask_prompt(const DrawArgs& a, int64_t b, uint32_t j, int64_t* noisy) {
    const uint8_t* prompt = a.prompt_mask + b * a.tokens;
    for (int64_t t = 0; t < a.tokens; ++t) {
        if (!prompt[t]) continue;
        const Words w = stream_words(static_cast<uint32_t>(t), j, a.sample_ids[b], kPromptTokens, a.seed);
        if (static_cast<int64_t>(w.x) < a.prompt_threshold) noisy[t] = a.mask_token_id;
    }
}

void select(const DrawArgs& a, int64_t* noisy, int32_t* count, float* weight, int threads) {
    const int64_t samples = a.hi - a.lo, segments = a.batch * samples;
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(a.tokens);
#pragma omp for schedule(static)
        for (int64_t s = 0; s < segments; ++s) {
            const int64_t b = s / samples, length = a.response_length(b);
            const uint32_t j = static_cast<uint32_t>(a.lo + s % samples);
            int64_t* ids = noisy + s * a.tokens;
            std::memcpy(ids, a.input_ids + b * a.tokens, a.tokens * sizeof(int64_t));
            if (a.scheme == kBernoulli) {
                mask_bernoulli(a, b, j, length, a.response_positions(b), scratch, ids, count[s], weight[s]);
            } else {
                const Count c = draw_count(law_of(a, b), j, a.sample_ids[b], a.seed, length);
                mask_selected(a, b, j, length, a.response_positions(b), scratch, ids, c);
                count[s] = static_cast<int32_t>(c.masked);
                weight[s] = c.weight;
            }
            if (a.prompt_mask && a.prompt_threshold > 0) mask_prompt(a, b, j, ids);
        }
    }
}

void emit_rows(const DrawArgs& a, const int64_t* noisy, const int64_t* offsets, int64_t* rows, int64_t* targets,
               int threads) {
    const int64_t samples = a.hi - a.lo, segments = a.batch * samples;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t s = 0; s < segments; ++s) {
        const int64_t b = s / samples, length = a.response_length(b);
        const int64_t* where = a.response_positions(b);
        int64_t at = offsets[s];
        for (int64_t p = 0; p < length; ++p) {
            const int64_t t = where[p];
            if (noisy[s * a.tokens + t] != a.mask_token_id) continue;
            rows[at] = s * a.tokens + t;
            targets[at++] = a.input_ids[b * a.tokens + t];
        }
    }
}

}  // namespace
}  // namespace bgpo::cpu
