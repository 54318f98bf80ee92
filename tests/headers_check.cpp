// Known answers and identities of csrc/bgpo, the arithmetic shared by the CPU engine and the CUDA kernels. Built with
// AddressSanitizer and UndefinedBehaviorSanitizer by test_sanitized.py, which runs one group per process.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "bgpo/bound.h"
#include "bgpo/draw.h"
#include "bgpo/select.h"
#include "bgpo/softmax.h"
#include "check.h"

using namespace bgpo;

namespace {

void check_words(const Words& got, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    CHECK(got.x == x && got.y == y && got.z == z && got.w == w);
}

// Random123's known answers, and the 10,000th output of C++26's std::philox4x32.
void philox_group() {
    const uint32_t ones = 0xFFFFFFFFu;
    check_words(philox({0, 0, 0, 0}, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8);
    check_words(philox({ones, ones, ones, ones}, ~uint64_t{0}), 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd);
    check_words(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822), 0xd16cfe09, 0x94fdcceb,
                0x5001e420, 0x24126ea1);
    CHECK(philox({2499, 0, 0, 0}, 20111115).w == 1955073260u);
    // The counter's fourth word: bits 32..55 of the sample id under the purpose; bits 56..63 name nothing.
    const Words direct = philox({7, 3, 0x89abcdefu, 0x234567u | 2u << 24}, 42);
    for (const int64_t id : {int64_t{0x0023456789abcdef}, int64_t{0x7f23456789abcdef}})
        check_words(stream_words(7, 3, id, kPromptTokens, 42), direct.x, direct.y, direct.z, direct.w);
    CHECK(stream_words(7, 3, 0x0123456789abcdef, kCounts, 42).x != direct.x);
}

// Whether position p is among the `count` smallest (key, position), as the kernels decide it from a threshold.
bool is_selected(const std::vector<uint64_t>& keys, const SelectionThreshold& t, size_t p) {
    if (keys[p] != t.key) return keys[p] < t.key;
    if (t.ties == kAllTies) return true;
    return std::count(keys.begin(), keys.begin() + p, keys[p]) < static_cast<long>(t.ties);
}

void check_selection(const std::vector<uint64_t>& keys, uint32_t count) {
    RadixState state;
    state.remaining = count;
    int passes = 0;
    while (!state.done) {
        uint32_t histogram[kRadixSize] = {};
        for (const uint64_t key : keys)
            if (radix_matches(state, key)) ++histogram[radix_digit(state, key)];
        radix_advance(state, histogram);
        ++passes;
    }
    CHECK(passes <= 8);
    std::vector<size_t> order(keys.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return keys[a] < keys[b]; });
    const SelectionThreshold t = radix_threshold(state);
    for (size_t rank = 0; rank < order.size(); ++rank) CHECK(is_selected(keys, t, order[rank]) == (rank < count));
}

// Against a stable sort, with keys from all distinct to all equal: ties go to the lowest positions.
void select_group() {
    std::mt19937_64 random(1);
    for (const uint64_t mask : {~0ull, 0xFFull, 0xC000000000000001ull, 0xFF0000000ull, 0ull})
        for (const size_t length : {1, 2, 3, 7, 64, 300}) {
            std::vector<uint64_t> keys(length);
            for (uint64_t& key : keys) key = random() & mask;
            for (uint32_t count = 1; count <= length; count += 1 + count / 7) check_selection(keys, count);
        }
}

void check_counts(int64_t length, int64_t n) {
    for (const bool stratified : {false, true})
        for (const uint32_t r : {0u, 1u, 0x7FFFFFFFu, 0xFFFFFFFEu, 0xFFFFFFFFu})
            for (const int64_t j : {int64_t{0}, n / 2, n - 1}) {
                const auto i = static_cast<uint32_t>(j);
                const int64_t l = stratified ? stratified_count(i, r, length, n) : uniform_count(r, length);
                CHECK(1 <= l && l <= length);
                const int64_t q = bernoulli_threshold(i, r, n, stratified);
                CHECK(1 <= q && q <= int64_t{1} << 32);
                if (n % 2) continue;
                const int64_t pair = coupled_count(i / 2, r, length, n, stratified);
                CHECK(0 <= pair && pair <= length);
            }
    CHECK(stratified_count(0, 0, length, n) == 1 && stratified_count(n - 1, ~0u, length, n) == length);
    CHECK(bernoulli_threshold(n - 1, ~0u, n, true) == int64_t{1} << 32);
}

// Limits of the integer laws up to n L = 2^31, where UBSan would see an overflow; tables against a linear search.
void counts_group() {
    for (const auto& [length, n] : {std::pair{1, 1}, {1, 2}, {2, 7}, {512, 16}, {32768, 65534}, {1 << 20, 2046}})
        check_counts(length, n);
    const std::vector<int64_t> thresholds = {5, 5, 9, 100, int64_t{4} << 32};
    for (const int64_t u : {0, 4, 5, 8, 9, 99, 100, 101}) {
        const auto found = std::upper_bound(thresholds.begin(), thresholds.end(), u) - thresholds.begin() + 1;
        CHECK(table_count(thresholds.data(), 5, u) == found);
    }
    const CountLaw coupled{kCoupled, kStratified, 8, nullptr, nullptr};
    for (uint32_t j = 0; j < 8; j += 2) {
        const Count even = draw_count(coupled, j, 11, 3, 100), odd = draw_count(coupled, j + 1, 11, 3, 100);
        CHECK(even.masked + odd.masked == 100);
        CHECK(even.weight == (even.masked ? ratio_weight(101, static_cast<double>(even.masked)) : 0.0f));
        const Selection first = selection_of(true, j, even.masked, 100), second = selection_of(true, j + 1, odd.masked, 100);
        CHECK(first.keys_of == j && second.keys_of == j && first.smallest == second.smallest);
        CHECK(first.smallest == even.masked && !first.others && second.others);
    }
    const Selection alone = selection_of(false, 3, 40, 100);
    CHECK(alone.keys_of == 3 && alone.smallest == 40 && !alone.others);
    const CountLaw bernoulli{kBernoulli, kStratified, 1, nullptr, nullptr};
    CHECK(draw_bernoulli(bernoulli, 0, 11, 3).last == count_word(0, 11, 3));  // q = r + 1
    CHECK(draw_count({kFull, kUniform, 1, nullptr, nullptr}, 0, 0, 0, 9).weight == 1.0f);
    const float weights[] = {1, 2, 3, 4, 5};
    const Count table = draw_count({kExact, kTable, 4, thresholds.data(), weights}, 1, 11, 3, 5);
    CHECK(table.weight == static_cast<float>(table.masked));
}

void exp_and_tanh() {
    for (double x = -110; x < 90; x += 0.00137) {
        const auto f = static_cast<float>(x);
        const double want = std::exp(static_cast<double>(f));
        if (f < kExpLow) CHECK(exp_(f) == 0.0f);
        else if (f < -86.98f) CHECK(exp_(f) >= 0.0f && exp_(f) <= 1.7e-38f);  // the last binade may be flushed
        else if (f < kExpHigh) CHECK(std::abs(exp_(f) - want) <= 1.2e-7 * want);
        CHECK(std::abs(tanh_(f / 8) - std::tanh(static_cast<double>(f / 8))) <= 2.5e-7);
    }
    CHECK(exp_(0.0f) == 1.0f && exp_(-INFINITY) == 0.0f && tanh_(INFINITY) == 1.0f && tanh_(-INFINITY) == -1.0f);
    CHECK(std::isnan(exp_(NAN)) && std::isnan(tanh_(NAN)));
}

RowState<double, double> state_of(const std::vector<double>& z, size_t begin, size_t end) {
    RowState<double, double> state;
    for (size_t i = begin; i < end; ++i) {
        raise_max(state, z[i]);
        const double shifted = z[i] - exp_base(state.max), e = exp_(shifted);
        state.sum += e;
        state.weighted += e == 0 ? 0 : e * shifted;
    }
    return state;
}

// One pass, two merged halves, and halves that hold only -inf agree; the gradient is that of finite differences.
void softmax_group() {
    exp_and_tanh();
    std::mt19937 random(2);
    std::normal_distribution<double> normal;
    std::vector<double> raw(37);
    for (double& x : raw) x = 3 * normal(random);
    raw[5] = -INFINITY;
    const Transform<double> f{0.7, 5.0, 1.0 / 1.3};
    std::vector<double> z(raw.size());
    for (size_t i = 0; i < z.size(); ++i) z[i] = transformed<true>(raw[i], f);
    z[6] = -INFINITY;
    const auto whole = state_of(z, 0, z.size());
    for (size_t cut = 0; cut <= z.size(); ++cut) {
        auto merged = state_of(z, 0, cut);
        merge(merged, state_of(z, cut, z.size()));
        CHECK(merged.max == whole.max && std::abs(merged.sum - whole.sum) < 1e-12 * whole.sum);
        CHECK(std::abs(merged.weighted - whole.weighted) < 1e-12 * std::abs(whole.weighted));
    }
    RowState<double, double> nothing;
    merge(nothing, state_of({-INFINITY, -INFINITY}, 0, 2));
    CHECK(nothing.max == -INFINITY && nothing.sum == 0);
    CHECK(log_probability(2.0, 2.0, 1.0) == 0.0 && log_probability(std::nextafter(2.0, 3.0), 2.0, 1.0) == 0.0);
}

// g logprob + h entropy of a row, by definition.
double objective(const std::vector<double>& raw, size_t target, const Transform<double>& f, double g, double h) {
    std::vector<double> z(raw.size());
    for (size_t i = 0; i < z.size(); ++i) z[i] = transformed<true>(raw[i], f);
    const auto s = state_of(z, 0, z.size());
    return g * log_probability(z[target], s.max, s.sum) + h * (std::log(s.sum) - s.weighted / s.sum);
}

void gradient_group() {
    std::mt19937 random(3);
    std::normal_distribution<double> normal;
    std::vector<double> raw(11);
    for (double& x : raw) x = 2 * normal(random);
    const Transform<double> f{0.7, 5.0, 1.0 / 1.3};
    const double g = 0.8, h = -0.3, step = 1e-6;
    const size_t target = 4;
    std::vector<double> z(raw.size());
    for (size_t i = 0; i < z.size(); ++i) z[i] = transformed<true>(raw[i], f);
    const auto s = state_of(z, 0, z.size());
    const double entropy = std::log(s.sum) - s.weighted / s.sum;
    const RowGradient<double> row{s.max, 1 / s.sum, g, h, std::log(s.sum), entropy, f.scale * f.inv_temperature};
    for (size_t i = 0; i < raw.size(); ++i) {
        auto up = raw, down = raw;
        up[i] += step;
        down[i] -= step;
        const double want = (objective(up, target, f, g, h) - objective(down, target, f, g, h)) / (2 * step);
        const double got = i == target ? target_gradient<true, true>(raw[i], f, row)
                                       : class_gradient<true, true>(raw[i], f, row);
        CHECK(std::abs(got - want) < 1e-8);
    }
    CHECK((class_gradient<false, true>(-double{INFINITY}, f, row) == 0.0));  // p = 0 contributes nothing, not NaN
}

void bound_group() {
    const Clip off{INFINITY, INFINITY, INFINITY}, ppo{0.2, 0.2, 3.0};
    CHECK(bound_term(0.0, 2.0, 4.0, off).term == 2.0 && bound_term(0.0, 2.0, 4.0, off).slope == 0.5);
    CHECK(bound_term(0.0, -2.0, 4.0, off).term == -2.0 && bound_term(0.0, -2.0, 4.0, off).slope == -0.5);
    CHECK(bound_term(-3.0, 1.0, 1.0, off).term == -2.0);  // 1 + d below zero, where exp(log(1 + d)) is NaN
    CHECK(bound_term(0.5, 1.0, 1.0, ppo).slope == 0.0 && bound_term(0.5, 1.0, 1.0, ppo).term == 1.2);
    CHECK(bound_term(-0.5, -1.0, 1.0, ppo).slope == 0.0 && bound_term(-0.5, -1.0, 1.0, ppo).term == -0.8);
    CHECK(bound_term(2.0, -1.0, 1.0, ppo).slope == 0.0 && bound_term(2.0, -1.0, 1.0, ppo).term == -3.0);
    for (const double advantage : {1.0, -1.0}) CHECK(std::isnan(bound_term(double{NAN}, advantage, 1.0, off).term));
    std::mt19937 random(4);
    std::normal_distribution<double> normal;
    for (int trial = 0; trial < 20000; ++trial) {  // mean of the terms <= A exp(mean d)
        const double advantage = normal(random);
        double mean = 0, terms = 0;
        for (int j = 0; j < 4; ++j) {
            const double d = 2 * normal(random);
            mean += d / 4;
            terms += bound_term(d, advantage, 1.0, off).term / 4;
        }
        const double exact = advantage * std::exp(mean);
        CHECK(terms <= exact + 1e-14 * (1 + std::abs(exact) + std::abs(terms)));
    }
}

}  // namespace

int main(int, char** arguments) {
    const struct {
        const char* name;
        void (*run)();
    } groups[] = {{"philox", philox_group},   {"select", select_group},     {"counts", counts_group},
                  {"softmax", softmax_group}, {"gradient", gradient_group}, {"bound", bound_group}};
    for (const auto& group : groups)
        if (!std::strcmp(group.name, arguments[1])) return group.run(), failures ? 1 : 0;
    return std::printf("no group %s\n", arguments[1]), 2;
}
