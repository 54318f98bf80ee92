// Row kernels on one chunk of logits: each row belongs to one thread, so results do not depend on the thread count.
//
// row_statistics  reads C*V logits once (block by block through L1) and writes 4 numbers a row.   ~20 flops/logit
// dlogits         reads and overwrites C*V logits.                                                ~22 flops/logit
// Arithmetic is fp32 whatever the logits (fp64 for fp64); sums within a block fp32 in 64 lanes, between blocks fp64.

#include "../bgpo/softmax.h"

namespace bgpo::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // 4 KiB of fp32: stays in L1 between the two passes over a block

constexpr int64_t kLanes = 64;  // partial sums of a block: each adds 16 terms, so fp32 loses next to nothing

// Sum of the lanes by halves; overwrites them.
template <typename T>
inline T pairwise_sum(T (&lanes)[kLanes]) {
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

struct BFloat16 {
    uint16_t bits;
};

inline float load(const float& x) { return x; }
inline double load(const double& x) { return x; }
inline float load(const BFloat16& x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

inline void store(float& out, float x) { out = x; }
inline void store(double& out, double x) { out = x; }
inline void store(BFloat16& out, float x) {  // round to nearest even; a NaN keeps a quiet bit
    const uint32_t u = float_bits(x);
    const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    out.bits = static_cast<uint16_t>(x != x ? 0x7FC0u : rounded);
}

template <typename Logit>
using Accumulate = std::conditional_t<std::is_same_v<Logit, double>, double, float>;

template <bool kBias, bool kCap, typename Logit, typename T>
inline T transformed_at(const Logit* row, const T* bias, int64_t k, const Transform<T>& f) {
    T raw = load(row[k]);
    if constexpr (kBias) raw += bias[k];
    return transformed<kCap>(raw, f);
}

template <bool kBias, bool kCap, bool kEntropy, typename Logit, typename T = Accumulate<Logit>>
void statistics_of_row(const Logit* row, int64_t vocab, int64_t target, const T* bias, const Transform<T>& f, T* stats,
                       int64_t stride) {
    RowState<T, double> state;
    alignas(64) T z[kBlock];
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        const int64_t size = std::min(kBlock, vocab - begin);
        T top = -INFINITY;
#pragma omp simd reduction(max : top)
        for (int64_t k = 0; k < size; ++k) {
            z[k] = transformed_at<kBias, kCap>(row, bias, begin + k, f);
            top = z[k] > top ? z[k] : top;
        }
        raise_max(state, top);
        const T base = exp_base(state.max);
        T sum[kLanes] = {}, weighted[kLanes] = {};
        const auto add = [&](int64_t k, int64_t lane) {
            const T shifted = z[k] - base;
            const T e = exp_(shifted);
            sum[lane] += e;
            if constexpr (kEntropy) weighted[lane] += e == T(0) ? T(0) : e * shifted;
        };
        int64_t k = 0;
        for (; k + kLanes <= size; k += kLanes) {
#pragma omp simd
            for (int64_t lane = 0; lane < kLanes; ++lane) add(k + lane, lane);
        }
#pragma omp simd
        for (int64_t lane = 0; lane < size - k; ++lane) add(k + lane, lane);
        state.sum += pairwise_sum(sum);
        if constexpr (kEntropy) state.weighted += pairwise_sum(weighted);
    }
    const T sum = static_cast<T>(state.sum);
    stats[0] = state.max;
    stats[stride] = sum;
    stats[2 * stride] = log_probability(transformed_at<kBias, kCap>(row, bias, target, f), state.max, sum);
    if constexpr (kEntropy) stats[3 * stride] = std::log(sum) - static_cast<T>(state.weighted / state.sum);
}

template <bool kBias, bool kCap, bool kEntropy, typename Logit, typename T = Accumulate<Logit>>
void gradient_of_row(Logit* row, int64_t vocab, int64_t target, const T* bias, const Transform<T>& f,
                     const RowGradient<T>& g) {
    if (g.grad_logprob == T(0) && g.grad_entropy == T(0)) {  // a dead row stays dead even where its logits are NaN
        std::memset(row, 0, vocab * sizeof(Logit));
        return;
    }
    T raw_target = load(row[target]);
    if constexpr (kBias) raw_target += bias[target];
#pragma omp simd
    for (int64_t k = 0; k < vocab; ++k) {
        T raw = load(row[k]);
        if constexpr (kBias) raw += bias[k];
        store(row[k], class_gradient<kCap, kEntropy>(raw, f, g));
    }
    store(row[target], target_gradient<kCap, kEntropy>(raw_target, f, g));
}

template <typename T>
Transform<T> make_transform(const Chunk& c) {
    return {static_cast<T>(c.scale), static_cast<T>(c.softcap), static_cast<T>(1.0 / c.temperature)};
}

template <typename Logit, bool kBias, bool kCap, bool kEntropy>
void statistics_of_chunk(const Chunk& c, int threads) {
    using T = Accumulate<Logit>;
    const auto f = make_transform<T>(c);
    auto* logits = static_cast<const Logit*>(c.logits);
    auto* stats = static_cast<T*>(c.stats);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < c.rows; ++i)
        statistics_of_row<kBias, kCap, kEntropy>(logits + i * c.row_stride, c.vocab, c.targets[i],
                                                 static_cast<const T*>(c.bias), f, stats + i, c.stats_stride);
}

template <typename Logit, bool kBias, bool kCap, bool kEntropy>
void gradient_of_chunk(const Chunk& c, const void* grad_logprob, const void* grad_entropy, int threads) {
    using T = Accumulate<Logit>;
    const auto f = make_transform<T>(c);
    const T chain = static_cast<T>(c.scale / c.temperature);
    auto* logits = static_cast<Logit*>(c.logits);
    auto* stats = static_cast<const T*>(c.stats);
    auto* g = static_cast<const T*>(grad_logprob);
    auto* h = static_cast<const T*>(grad_entropy);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < c.rows; ++i) {
        const T sum = stats[i + c.stats_stride];
        const RowGradient<T> row{stats[i], T(1) / sum, g[i], kEntropy ? h[i] : T(0), std::log(sum),
                                 kEntropy ? stats[i + 3 * c.stats_stride] : T(0), chain};
        gradient_of_row<kBias, kCap, kEntropy>(logits + i * c.row_stride, c.vocab, c.targets[i],
                                               static_cast<const T*>(c.bias), f, row);
    }
}

// Turns the run-time options into template parameters: call(type tag, bias, cap, entropy).
template <typename F>
void specialise(const Chunk& c, bool entropy, F&& call) {
    const auto with_flags = [&](auto logit) {
        const auto with_cap = [&](auto bias, auto cap) {
            entropy ? call(logit, bias, cap, std::true_type{}) : call(logit, bias, cap, std::false_type{});
        };
        const auto with_bias = [&](auto bias) {
            c.softcap > 0 ? with_cap(bias, std::true_type{}) : with_cap(bias, std::false_type{});
        };
        c.bias ? with_bias(std::true_type{}) : with_bias(std::false_type{});
    };
    switch (c.type) {
        case LogitType::kFloat: return with_flags(float{});
        case LogitType::kBFloat16: return with_flags(BFloat16{});
        case LogitType::kDouble: return with_flags(double{});
        case LogitType::kHalf: return;  // never: see LogitType
    }
}

void row_statistics(const Chunk& c, bool entropy, int threads) {
    specialise(c, entropy, [&](auto logit, auto bias, auto cap, auto ent) {
        statistics_of_chunk<decltype(logit), decltype(bias)::value, decltype(cap)::value, decltype(ent)::value>(c,
                                                                                                            threads);
    });
}

void dlogits(const Chunk& c, const void* grad_logprob, const void* grad_entropy, int threads) {
    specialise(c, grad_entropy != nullptr, [&](auto logit, auto bias, auto cap, auto ent) {
        gradient_of_chunk<decltype(logit), decltype(bias)::value, decltype(cap)::value, decltype(ent)::value>(
            c, grad_logprob, grad_entropy, threads);
    });
}

}  // namespace
}  // namespace bgpo::cpu
