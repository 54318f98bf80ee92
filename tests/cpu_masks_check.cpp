// The CPU engine's mask kernels between guards, for test_sanitized.py to run under AddressSanitizer and
// UndefinedBehaviorSanitizer. Bits are compared with the reference elsewhere; here counts, order and bounds.
#define BGPO_TABLE kernels_checked
#include "cpu/kernels.cpp"

#include <vector>

#include "check.h"

using namespace bgpo;
using namespace bgpo::cpu;

namespace {

constexpr int64_t kSamples = 4, kMask = 1000, kThreads = 2;

// `size` numbers to be written, and behind them some that are not: the sanitizer does not look into vector intrinsics.
struct Guarded {
    static constexpr int64_t kGuard = 16, kSentinel = -77;
    int64_t size;
    std::vector<int64_t> values;

    explicit Guarded(int64_t size) : size(size), values(size + kGuard, kSentinel) {}
    int64_t* data() { return values.data(); }
    int64_t operator[](int64_t i) const { return values[i]; }
    bool intact() const {
        return std::count(values.begin() + size, values.end(), kSentinel) == kGuard;
    }
};

// Two rows of `length` response tokens each, in one run or every second one, between tokens of a prompt.
struct Batch {
    int64_t length, tokens;
    std::vector<int64_t> ids, sample_ids{3, -5};
    std::vector<uint8_t> response, prompt;
    std::vector<int64_t> index;
    std::vector<Response> responses;

    Batch(int64_t length, bool run) : length(length), tokens((run ? length : 2 * length) + 3) {
        for (int64_t t = 0; t < tokens; ++t)
            if (run ? t >= 2 && t < 2 + length : t % 2 == 0 && t < 2 * length) index.push_back(t);
        std::vector<uint8_t> row(tokens);
        for (const int64_t t : index) row[t] = 1;
        for (int b = 0; b < 2; ++b) {
            response.insert(response.end(), row.begin(), row.end());
            responses.push_back({length, index[0], run ? nullptr : index.data()});
        }
        for (const uint8_t r : response) prompt.push_back(1 - r);
        for (size_t i = 0; i < response.size(); ++i) ids.push_back(static_cast<int64_t>(i * 7 % 500));
    }
};

void check(const Batch& batch, int scheme, int64_t prompt_threshold, int64_t lo, int64_t hi) {
    const int64_t samples = hi - lo;
    std::vector<int64_t> lengths(2), offsets(2 * samples + 1);
    const Facts facts = kernels_checked.input_facts(batch.ids.data(), batch.response.data(), batch.prompt.data(), 2,
                                                    batch.tokens, kMask, lengths.data());
    CHECK(lengths[0] == batch.length && lengths[1] == batch.length && !facts.held && !facts.overlap);
    std::vector<int32_t> count(2 * samples);
    std::vector<float> weight(2 * samples);
    const CountArgs counts{lengths.data(), batch.sample_ids.data(), 2, kSamples, lo, hi, 9, scheme, kStratified,
                           nullptr, nullptr, nullptr};
    kernels_checked.draw_counts(counts, count.data(), weight.data(), offsets.data(), kThreads);
    Guarded noisy(2 * samples * batch.tokens), rows(offsets.back()), targets(offsets.back());
    const DrawArgs draw{batch.ids.data(), batch.responses.data(), batch.prompt.data(), batch.sample_ids.data(),
                        offsets.data(), 2, batch.tokens, lo, hi, 9, kMask, scheme == kCoupled, prompt_threshold};
    kernels_checked.draw_masks(draw, noisy.data(), rows.data(), targets.data(), kThreads);
    CHECK(noisy.intact() && rows.intact() && targets.intact());
    int64_t at = 0;
    for (int64_t i = 0; i < noisy.size; ++i) {
        const int64_t t = i / (batch.tokens * samples) * batch.tokens + i % batch.tokens;
        if (batch.response[t] && noisy[i] == kMask) {
            CHECK(at < offsets.back() && rows[at] == i && targets[at] == batch.ids[t]);
            ++at;
        } else {
            CHECK(noisy[i] == batch.ids[t] || (batch.prompt[t] && prompt_threshold > 0));
        }
    }
    CHECK(at == offsets.back());
}

}  // namespace

int main() {
    for (const int64_t length : {1, 2, 7, 8, 15, 16, 17, 31, 48, 49, 63, 64, 65, 100, 127, 128, 129, 512, 515, 3000})
        for (const bool run : {true, false}) {
            const Batch batch(length, run);
            for (const int scheme : {kExact, kBernoulli, kCoupled, kFull})
                for (const int64_t threshold : {int64_t{0}, int64_t{1} << 31}) {
                    check(batch, scheme, threshold, 0, kSamples);
                    // each sample by itself too: then the end of its rows is the end of the list
                    for (int64_t j = 0; j < kSamples; ++j) check(batch, scheme, threshold, j, j + 1);
                }
        }
    return failures != 0;
}
