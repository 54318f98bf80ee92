// Row statistics of a chunk of logits [C, V]: max, sum of exp, log-probability of the target, entropy (softmax.h).
//
// Moves   C*V*sizeof(logit) bytes read once, 16 (12 without entropy) written per row: bound by memory bandwidth.
// Work    one exp and ~16 instructions per logit (~40 with a softcap).
// Sums    fp32, fp64 for fp64 logits: 16 terms at a time by one thread, then that thread's partial sums, then threads
//         in a fixed tree. The running maximum starts at -inf and each sum is rescaled when it rises.
//
// A thread holds kTile elements in registers (64 bytes of fp32 in flight): their maximum first, so the running maximum,
// with its extra exp, is touched once per kTile elements.
#include "rows.cuh"

namespace bgpo::cuda {
namespace {

template <typename T>
using State = RowState<T, T>;

// Adds N values of z to a thread's running state.
template <bool kEntropy, int N, typename T>
__device__ __forceinline__ void absorb(State<T>& state, const T (&z)[N]) {
    T top = z[0];
#pragma unroll
    for (int i = 1; i < N; ++i) top = ::fmax(top, z[i]);  // ignores a NaN, which then reaches the sum
    raise_max(state, top);
    const T base = exp_base(state.max);
    T sum = 0, weighted = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const T shifted = z[i] - base;
        const T e = exp_(shifted);
        sum += e;
        if constexpr (kEntropy) weighted += e == T(0) ? T(0) : e * shifted;
    }
    state.sum += sum;
    state.weighted += weighted;
}

template <typename T>
__device__ __forceinline__ State<T> shuffle_down(const State<T>& state, int step) {
    return {__shfl_down_sync(kAllLanes, state.max, step), __shfl_down_sync(kAllLanes, state.sum, step),
            __shfl_down_sync(kAllLanes, state.weighted, step)};
}

// The block's state in thread 0.
template <typename T>
__device__ State<T> merge_block(State<T> state) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ State<T> of_warp[kWarps];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll 1
    for (int step = kWarp / 2; step > 0; step /= 2) merge(state, shuffle_down(state, step));
    if (lane == 0) of_warp[warp] = state;
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll 1
        for (int w = 1; w < kWarps; ++w) merge(state, of_warp[w]);
    }
    return state;
}

template <typename Logit, bool kBias, bool kCap, bool kEntropy>
__global__ void __launch_bounds__(kThreads, kResident<Logit>)
    row_statistics_kernel(Chunk c, Transform<Accumulate<Logit>> f) {
    using T = Accumulate<Logit>;
    constexpr int kGroup = kVectorBytes / sizeof(Logit), kTile = sizeof(Logit) == 8 ? 8 : 16, kGroups = kTile / kGroup;
    const int64_t i = blockIdx.x;
    const auto* row = static_cast<const Logit*>(c.logits) + i * c.row_stride;
    const auto* bias = static_cast<const T*>(c.bias);
    const bool aligned = is_aligned(row);
    const auto z_of = [&](Logit x, int64_t k) { return transformed<kCap>(raw_logit<kBias>(x, bias, k), f); };

    State<T> state;
    int64_t begin = 0;
    for (; begin + kThreads * kTile <= c.vocab; begin += kThreads * kTile) {
        Group<Logit, kGroup> groups[kGroups];
        T z[kTile];
        const int64_t first = begin + threadIdx.x * kGroup;
#pragma unroll
        for (int u = 0; u < kGroups; ++u) load_group(groups[u], row + first + u * kThreads * kGroup, aligned);
#pragma unroll
        for (int e = 0; e < kTile; ++e) {
            const int u = e / kGroup, within = e % kGroup;
            z[e] = z_of(groups[u].x[within], first + u * kThreads * kGroup + within);
        }
        absorb<kEntropy>(state, z);
    }
    for (int64_t k = begin + threadIdx.x * kGroup; k + kGroup <= c.vocab; k += kThreads * kGroup) {
        Group<Logit, kGroup> group;
        T z[kGroup];
        load_group(group, row + k, aligned);
#pragma unroll
        for (int e = 0; e < kGroup; ++e) z[e] = z_of(group.x[e], k + e);
        absorb<kEntropy>(state, z);
    }
    const int64_t last = c.vocab - c.vocab % kGroup + threadIdx.x;  // fewer elements than one group are left
    if (last < c.vocab) {
        const T z[1] = {z_of(row[last], last)};
        absorb<kEntropy>(state, z);
    }

    state = merge_block(state);
    if (threadIdx.x != 0) return;
    const int64_t target = c.targets[i];
    T* stats = static_cast<T*>(c.stats) + i;
    stats[0] = state.max;
    stats[c.stats_stride] = state.sum;
    stats[2 * c.stats_stride] = log_probability(z_of(row[target], target), state.max, state.sum);
    if constexpr (kEntropy) stats[3 * c.stats_stride] = ::log(state.sum) - state.weighted / state.sum;
}

template <typename Logit>
void launch_for(const Queue& queue, const Chunk& c, bool entropy) {
    const auto f = make_transform<Accumulate<Logit>>(c);
    specialise(c, entropy, [&](auto bias, auto cap, auto ent) {
        launch("row_statistics",
               row_statistics_kernel<Logit, decltype(bias)::value, decltype(cap)::value, decltype(ent)::value>, queue,
               c.rows, kThreads, c, f);
    });
}

}  // namespace

void row_statistics(const Queue& queue, const Chunk& c, bool entropy) {
    switch (c.type) {
        case LogitType::kFloat: return launch_for<float>(queue, c, entropy);
        case LogitType::kBFloat16: return launch_for<BFloat16>(queue, c, entropy);
        case LogitType::kHalf: return launch_for<Half>(queue, c, entropy);
        case LogitType::kDouble: return launch_for<double>(queue, c, entropy);
    }
}

}  // namespace bgpo::cuda
