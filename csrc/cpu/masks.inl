// Random masking: keys, selection and noisy ids, one segment (sequence b, sample j) per task; then the row lists.
//
// select     per segment: L Philox calls (vectorised over positions), 2-3 radix passes over L keys in L1/L2, T writes.
// emit_rows  per segment: one look at its L response positions.
// No floating point but the fp32 weight; no state; any split over threads gives the same bits.

#include "../bgpo/draw.h"
#include "../bgpo/select.h"
#include "lanes.h"

namespace bgpo::cpu {
namespace {

constexpr int64_t kFewKeys = 48;

// Per-thread buffers, with room for a register beyond their end; plain arrays: a standard container instantiated here would be compiled once per instruction set
// and the linker would keep any one of the copies.
struct Scratch {
    uint64_t* keys;
    uint64_t* candidates;

    explicit Scratch(int64_t size) : keys(new uint64_t[2 * (size + kLanes)]), candidates(keys + size + kLanes) {}
    ~Scratch() { delete[] keys; }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

SelectionThreshold radix_selection(const uint64_t* keys, int64_t length, int64_t count) {
    RadixState state;
    state.remaining = static_cast<uint32_t>(count);
    uint32_t histogram[kRadixSize];
    while (!state.done) {
        std::memset(histogram, 0, sizeof(histogram));
        for (int64_t i = 0; i < length; ++i)
            if (radix_matches(state, keys[i])) ++histogram[radix_digit(state, keys[i])];
        radix_advance(state, histogram);
    }
    return radix_threshold(state);
}

// The key of rank `count` among a few, by counting the smaller ones of each.
SelectionThreshold selection_by_rank(const uint64_t* keys, int64_t length, int64_t count) {
    for (int64_t i = 0;; ++i) {
        const int64_t smaller = count_below(keys, length, keys[i]);
        if (smaller >= count) continue;
        const int64_t equal = count_equal(keys, length, keys[i]);
        if (count > smaller + equal) continue;
        return {keys[i], equal == 1 ? kAllTies : static_cast<uint32_t>(count - smaller)};
    }
}

// Threshold of the `count` smallest keys (count >= 1). The keys are uniform, so the one of that rank lies within three
// standard deviations of count / L of their range in 99.7% of draws: one vector pass keeps the few candidates there
// (68 of 512), and again, until counting ranks is cheapest. A miss falls back to radix selection, with the same result.
SelectionThreshold threshold_of(const Scratch& s, int64_t length, int64_t count) {
    const uint64_t* keys = s.keys;
    double low = 0.0, width = 18446744073709551616.0;  // the keys' range [low, low + width)
    int64_t size = length, rank = count;
    while (size > kFewKeys) {
        const double q = static_cast<double>(rank) / (size + 1.0), spread = 3.0 * std::sqrt(q * (1.0 - q) / size);
        const double begin = low + width * std::max(0.0, q - spread), end = low + width * std::min(1.0, q + spread);
        const uint64_t first = to_key(begin), last = to_key(end);  // candidates are first <= key <= last
        const int64_t below = count_below(keys, size, first);
        const int64_t kept = keep_between(keys, size, first, last, s.candidates);
        if (rank <= below || rank > below + kept || kept == size) return radix_selection(s.keys, length, count);
        keys = s.candidates;
        rank -= below;
        size = kept;
        low = begin;
        width = end - begin;
    }
    return selection_by_rank(keys, size, rank);
}

CountLaw law_of(const DrawArgs& a, int64_t b) {
    const int64_t at = a.schedule == kTable ? a.table_start[b] : 0;
    return {a.scheme, a.schedule, a.n, a.thresholds + at, a.table_weights + at};
}

// Writes the noisy row: the mask token where the key is selected (or, for a complement, where it is not), the clean
// tokens elsewhere. No data-dependent branch: half of the tokens are masked at random and every second one would be
// mispredicted.
void write_row(const SelectionThreshold& t, const uint64_t* keys, bool complement, int64_t mask_id,
               const Response& where, const int64_t* clean, int64_t tokens, int64_t* noisy) {
    const int64_t length = where.length;
    if (where.contiguous() && t.ties == kAllTies) {
        const int64_t *source = clean + where.first, after = where.first + length;
        int64_t* ids = noisy + where.first;
        std::memcpy(noisy, clean, where.first * sizeof(int64_t));
#pragma omp simd
        for (int64_t p = 0; p < length; ++p) ids[p] = (keys[p] <= t.key) != complement ? mask_id : source[p];
        std::memcpy(noisy + after, clean + after, (tokens - after) * sizeof(int64_t));
        return;
    }
    std::memcpy(noisy, clean, tokens * sizeof(int64_t));
    uint32_t ties = t.ties;  // equal keys are filled in position order
    for (int64_t p = 0; p < length; ++p) {
        const bool equal = keys[p] == t.key && ties > 0;
        ties -= equal;
        int64_t& id = noisy[where[p]];
        id = (keys[p] < t.key || equal) != complement ? mask_id : id;
    }
}

void mask_bernoulli(const DrawArgs& a, int64_t b, uint32_t j, const Response& where, Scratch& s, int64_t* noisy,
                    int32_t& count, float& weight) {
    const BernoulliDraw draw = draw_bernoulli(law_of(a, b), j, a.sample_ids[b], a.seed);
    make_keys(where.length, j, a.sample_ids[b], a.seed, s.keys);
    // word 0 < q is key <= (q << 32) - 1, and q = 2^32 wraps to all ones: every token
    const SelectionThreshold t{(static_cast<uint64_t>(draw.threshold) << 32) - 1, kAllTies};
    write_row(t, s.keys, false, a.mask_token_id, where, a.input_ids + b * a.tokens, a.tokens, noisy);
    int32_t masked = 0;
#pragma omp simd reduction(+ : masked)
    for (int64_t p = 0; p < where.length; ++p) masked += s.keys[p] <= t.key;
    count = masked;
    weight = draw.weight;
}

void mask_selected(const DrawArgs& a, int64_t b, uint32_t j, const Response& where, Scratch& s, int64_t* noisy,
                   const Count& c) {
    SelectionThreshold t{~uint64_t{0}, kAllTies};  // every token, or none for a complement
    const bool everything = c.masked == where.length, nothing = c.masked == 0;
    if (everything || nothing) {
        std::memset(s.keys, 0, where.length * sizeof(uint64_t));
    } else {
        make_keys(where.length, key_sample(c, j), a.sample_ids[b], a.seed, s.keys);
        t = threshold_of(s, where.length, c.drawn);
    }
    const bool complement = everything ? false : nothing || c.complement;
    write_row(t, s.keys, complement, a.mask_token_id, where, a.input_ids + b * a.tokens, a.tokens, noisy);
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
            const int64_t b = s / samples;
            const Response& where = a.responses[b];
            const uint32_t j = static_cast<uint32_t>(a.lo + s % samples);
            int64_t* ids = noisy + s * a.tokens;
            if (a.scheme == kBernoulli) {
                mask_bernoulli(a, b, j, where, scratch, ids, count[s], weight[s]);
            } else {
                const Count c = draw_count(law_of(a, b), j, a.sample_ids[b], a.seed, where.length);
                mask_selected(a, b, j, where, scratch, ids, c);
                count[s] = static_cast<int32_t>(c.masked);
                weight[s] = c.weight;
            }
            if (a.prompt_mask && a.prompt_threshold > 0) mask_prompt(a, b, j, ids);
        }
    }
}

// Rows and targets of one segment, `count` of them. Every position is written to the next free place and kept only if
// masked: no branch to mispredict.
void emit_segment(const Response& where, const int64_t* clean, const int64_t* noisy, int64_t mask_id, int64_t base,
                  int64_t count, int64_t* rows, int64_t* targets) {
    int64_t p = 0, at = 0;
    if (where.contiguous()) p = keep_masked(where, clean, noisy, mask_id, base, count, rows, targets, at);
    for (; p < where.length && at < count; ++p) {
        const int64_t t = where[p];
        rows[at] = base + t;
        targets[at] = clean[t];
        at += noisy[t] == mask_id;
    }
}

void emit_rows(const DrawArgs& a, const int64_t* noisy, const int64_t* offsets, int64_t* rows, int64_t* targets,
               int threads) {
    const int64_t samples = a.hi - a.lo, segments = a.batch * samples;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t s = 0; s < segments; ++s) {
        const int64_t b = s / samples, end = offsets[s + 1];
        const Response& where = a.responses[b];
        const int64_t* ids = a.input_ids + b * a.tokens;
        emit_segment(where, ids, noisy + s * a.tokens, a.mask_token_id, s * a.tokens, end - offsets[s],
                     rows + offsets[s], targets + offsets[s]);
    }
}

}  // namespace
}  // namespace bgpo::cpu
