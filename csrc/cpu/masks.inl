// Random masking, one segment (sequence b, sample j) per task: counts, then, with every segment's place known, all else.
//
// input_facts  one pass over the inputs: response lengths and what is wrong with the ids.
// draw_counts  one Philox call a segment; Bernoulli: one a token.
// draw_masks   per segment L Philox calls, one vector pass and some over the words to find the threshold, one pass that
//              writes T noisy ids and the masked rows with their targets. Bytes: 8T + 16 a masked row written, 8T read
//              (from cache: n segments share them), 4L of words in L1.
// No floating point but the fp32 weight; no state; any split over threads gives the same bits.
//
// Selection works on word 0 of the 64-bit keys. Word 1 matters only where two of a response's words 0 are equal and the
// threshold falls between them (1e-7 a segment at L = 512, 8e-6 at 32768); then the keys are drawn in full.

#include "../bgpo/draw.h"
#include "../bgpo/select.h"
#include "lanes.h"

namespace bgpo::cpu {
namespace {

constexpr int64_t kFewWords = 48;
constexpr int64_t kManySegments = 1 << 14;

// Per-thread buffers. Plain arrays: a standard container instantiated here would be compiled once per instruction set
// and the linker would keep any one of the copies.
struct Scratch {
    uint32_t *words, *candidates;

    explicit Scratch(int64_t size)
        : words(new uint32_t[2 * (size + kRoom)]), candidates(words + size + kRoom) {}
    ~Scratch() { delete[] words; }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

// A word that exactly `count` words do not exceed, if there is one.
struct Threshold {
    bool found;
    uint32_t last;
};

// Among a few words, by counting for each how many do not exceed it.
Threshold threshold_of_few(const uint32_t* words, int64_t length, int64_t count) {
    for (int64_t i = 0; i < length; ++i)
        if (count_not_above(words, length, words[i]) == count) return {true, words[i]};
    return {false, 0};
}

// The words are uniform, so the one of rank `count` lies within four standard deviations of count / L of their range in
// all but 6e-5 of draws: a vector pass keeps the few candidates there (90 of 512), and again, until counting is
// cheapest. Not found: outside of that bracket, or equal words at the threshold.
Threshold threshold_of(const Scratch& s, int64_t length, int64_t count) {
    const uint32_t* words = s.words;
    double low = 0.0, width = 4294967296.0;  // the words' range [low, low + width)
    int64_t size = length, rank = count;
    while (size > kFewWords) {
        const double q = static_cast<double>(rank) / (size + 1.0), spread = 4.0 * std::sqrt(q * (1.0 - q) / size);
        const double begin = low + width * std::max(0.0, q - spread), end = low + width * std::min(1.0, q + spread);
        const auto first = static_cast<uint32_t>(begin), last = static_cast<uint32_t>(std::min(end, 4294967295.0));
        const Split split = split_words(words, size, first, last, s.candidates);
        rank -= split.below;
        if (rank < 1 || rank > split.kept || split.kept == size) return {false, 0};
        words = s.candidates;
        size = split.kept;
        low = begin;
        width = end - begin;
    }
    return threshold_of_few(words, size, rank);
}

// The selection keys of a sample: word 0 of all at once, or one whole key.
struct StreamKeys {
    uint32_t j;
    int64_t sample_id;
    uint64_t seed;

    void words(int64_t length, uint32_t* out) const { make_words(length, j, sample_id, seed, out); }
    uint64_t key(int64_t p) const {
        return selection_key(stream_words(static_cast<uint32_t>(p), j, sample_id, kSelectionKeys, seed));
    }
};

// The `count` smallest by whole keys, ties in position order: 0 for their words and 1 for the others.
template <typename Keys>
void select_by_keys(const Keys& keys, int64_t length, int64_t count, uint32_t* words) {
    RadixState state;
    state.remaining = static_cast<uint32_t>(count);
    uint32_t histogram[kRadixSize];
    while (!state.done) {
        std::memset(histogram, 0, sizeof(histogram));
        for (int64_t p = 0; p < length; ++p) {
            const uint64_t key = keys.key(p);
            if (radix_matches(state, key)) ++histogram[radix_digit(state, key)];
        }
        radix_advance(state, histogram);
    }
    const SelectionThreshold t = radix_threshold(state);
    uint32_t ties = t.ties;
    for (int64_t p = 0; p < length; ++p) {
        const uint64_t key = keys.key(p);
        const bool tied = key == t.key && ties > 0;
        ties -= tied;
        words[p] = key < t.key || tied ? 0 : 1;
    }
}

// Leaves words and returns a bound on them that say what a segment masks: the p with (words[p] <= bound) != others.
template <typename Keys>
uint32_t select_words(const Keys& keys, int64_t length, int64_t smallest, const Scratch& s) {
    if (smallest == 0 || smallest == length) {  // no keys to draw: all or nothing
        for (int64_t p = 0; p < length; ++p) s.words[p] = smallest == 0;
        return 0;
    }
    keys.words(length, s.words);
    const Threshold t = threshold_of(s, length, smallest);
    if (t.found) return t.last;
    select_by_keys(keys, length, smallest, s.words);
    return 0;
}

// Noisy ids, rows and targets of one segment with `masked` tokens. No data-dependent branch: half of the tokens are
// masked at random and every second one would be mispredicted. Every position goes to the next free place of the lists
// and stays there only if masked; after the last masked one the row is as it was copied.
void write_segment(const Response& where, const uint32_t* words, uint32_t last, bool others, int64_t masked,
                   int64_t mask_id, const int64_t* clean, int64_t tokens, const Output& out) {
    int64_t p = 0, at = 0;
    if (where.contiguous()) {
        p = write_run(where, words, last, others, mask_id, clean, out, at);
        const int64_t next = where.first + p;
        std::memcpy(out.noisy, clean, where.first * sizeof(int64_t));
        std::memcpy(out.noisy + next, clean + next, (tokens - next) * sizeof(int64_t));
    } else {
        std::memcpy(out.noisy, clean, tokens * sizeof(int64_t));
    }
    for (; at < masked; ++p) {
        const int64_t t = where[p], id = clean[t];
        const bool here = (words[p] <= last) != others;
        out.noisy[t] = here ? mask_id : id;
        out.rows[at] = out.base + t;
        out.targets[at] = id;
        at += here;
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

Facts input_facts(const int64_t* input_ids, const uint8_t* response_mask, const uint8_t* prompt_mask, int64_t batch,
                  int64_t tokens, int64_t mask_token_id, int64_t* lengths) {
    int64_t lowest = INT64_MAX, highest = INT64_MIN, largest = 0, held = 0, overlap = 0;
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t* ids = input_ids + b * tokens;
        const uint8_t* response = response_mask + b * tokens;
        int64_t length = 0;
#pragma omp simd reduction(min : lowest) reduction(max : highest, largest) reduction(+ : length) reduction(| : held)
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t id = ids[t], inside = response[t], scored = inside ? id : 0;
            lowest = id < lowest ? id : lowest;
            highest = id > highest ? id : highest;
            largest = scored > largest ? scored : largest;
            length += inside;
            held |= inside & (id == mask_token_id);
        }
        if (prompt_mask)
            for (int64_t t = 0; t < tokens; ++t) overlap |= response[t] & prompt_mask[b * tokens + t];
        lengths[b] = length;
    }
    return {lowest, highest, largest, held != 0, overlap != 0};
}

// Counts and weights of the samples of sequence b.
void counts_of_sequence(const CountArgs& a, int64_t b, const Scratch& scratch, int32_t* count, float* weight) {
    const int64_t at = a.schedule == kTable ? a.table_start[b] : 0, id = a.sample_ids[b];
    const CountLaw law{a.scheme, a.schedule, a.n, a.thresholds + at, a.table_weights + at};
    const int64_t length = a.lengths[b];
    for (int64_t i = 0; i < a.hi - a.lo; ++i) {
        const auto j = static_cast<uint32_t>(a.lo + i);
        if (a.scheme == kBernoulli) {
            const BernoulliDraw draw = draw_bernoulli(law, j, id, a.seed);
            make_words(length, j, id, a.seed, scratch.words);
            count[i] = static_cast<int32_t>(count_not_above(scratch.words, length, draw.last));
            weight[i] = draw.weight;
        } else {
            const Count c = draw_count(law, j, id, a.seed, length);
            count[i] = static_cast<int32_t>(c.masked);
            weight[i] = c.weight;
        }
    }
}

void draw_counts(const CountArgs& a, int32_t* count, float* weight, int64_t* offsets, int threads) {
    const int64_t samples = a.hi - a.lo;
    // Unless every token is looked at, there is less to do than it takes to wake a thread.
    [[maybe_unused]] const bool share = a.scheme == kBernoulli || a.batch * samples > kManySegments;
    int64_t longest = 0;
    for (int64_t b = 0; b < a.batch; ++b) longest = a.lengths[b] > longest ? a.lengths[b] : longest;
#pragma omp parallel num_threads(threads) if (share)
    {
        const Scratch scratch(a.scheme == kBernoulli ? longest : 0);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < a.batch; ++b)
            counts_of_sequence(a, b, scratch, count + b * samples, weight + b * samples);
    }
    offsets[0] = 0;
    for (int64_t s = 0; s < a.batch * samples; ++s) offsets[s + 1] = offsets[s] + count[s];
}

void draw_masks(const DrawArgs& a, int64_t* noisy, int64_t* rows, int64_t* targets, int threads) {
    const int64_t samples = a.hi - a.lo, segments = a.batch * samples;
#pragma omp parallel num_threads(threads)
    {
        const Scratch scratch(a.tokens);
#pragma omp for schedule(dynamic, 16)  // a thread that was asleep joins late
        for (int64_t s = 0; s < segments; ++s) {
            const int64_t b = s / samples, place = a.offsets[s], masked = a.offsets[s + 1] - place;
            const uint32_t j = static_cast<uint32_t>(a.lo + s % samples);
            const Response& where = a.responses[b];
            const Selection selection = selection_of(a.coupled, j, masked, where.length);
            const StreamKeys keys{selection.keys_of, a.sample_ids[b], a.seed};
            const uint32_t last = select_words(keys, where.length, selection.smallest, scratch);
            const Output out{noisy + s * a.tokens, rows + place, targets + place, s * a.tokens};
            write_segment(where, scratch.words, last, selection.others, masked, a.mask_token_id,
                          a.input_ids + b * a.tokens, a.tokens, out);
            if (a.prompt_mask && a.prompt_threshold > 0) mask_prompt(a, b, j, out.noisy);
        }
    }
}

}  // namespace
}  // namespace bgpo::cpu
