// Gradient of a chunk of raw logits [C, V], written over them (softmax.h): same dtype, or bf16/fp16 over fp32.
//
// Moves   C*V*(sizeof(in) + sizeof(out)) bytes: 6 per logit for fp32 -> bf16, 8 for fp32. Bound by memory bandwidth.
// Work    one exp and ~15 instructions per logit (~45 with a softcap). fp32, fp64 for fp64 logits; rounded once.
// Order   element-wise, so nothing is accumulated.
//
// A narrow row begins where its wide row began: output element k lies on the bytes of input element k/2. A CTA walks
// its row left to right in equal tiles, loads a whole tile into registers, and passes a barrier before it stores.
// Tile t's stores then fall on the inputs of tiles below t (equal tiles: t * tile >= (t + 1) * tile / 2 for t >= 1)
// or, for t = 0, on its own; all of these are in registers by then, and the loads of tile t + 1 lie beyond. Rows
// never share bytes.
#include "rows.cuh"

namespace bgpo::cuda {
namespace {

template <typename T>
struct Upstream {
    const T *grad_logprob, *grad_entropy;  // [rows]
    T chain;                               // scale / temperature
};

template <bool kEntropy, typename T>
__device__ __forceinline__ RowGradient<T> row_gradient(const Chunk& c, const Upstream<T>& up, int64_t i) {
    const T* stats = static_cast<const T*>(c.stats) + i;
    const T sum = stats[c.stats_stride];
    return {stats[0],
            T(1) / sum,
            up.grad_logprob[i],
            kEntropy ? up.grad_entropy[i] : T(0),
            static_cast<T>(::log(sum)),
            kEntropy ? stats[3 * c.stats_stride] : T(0),
            up.chain};
}

// Groups of one tile: kGroups per thread, kThreads * kGroup elements apart.
template <typename In, typename Out>
struct Tile {
    static constexpr int kGroup = kVectorBytes / (sizeof(Out) < sizeof(In) ? sizeof(Out) : sizeof(In));
    static constexpr int kSize = sizeof(In) == 8 ? 8 : 16;  // elements per thread
    static constexpr int kGroups = kSize / kGroup;
    static constexpr int64_t kStep = kThreads * kGroup, kWidth = kThreads * kSize;
    static constexpr bool kOverlaps = sizeof(Out) != sizeof(In);
};

template <typename Out>
__device__ __forceinline__ void zero_row(Out* out, int64_t vocab, bool aligned) {
    constexpr int kGroup = kVectorBytes / sizeof(Out);
    const Group<Out, kGroup> zeros{};
    for (int64_t k = threadIdx.x * kGroup; k + kGroup <= vocab; k += kThreads * kGroup)
        store_group(out + k, zeros, aligned);
    const int64_t last = vocab - vocab % kGroup + threadIdx.x;
    if (last < vocab) out[last] = Out{};
}

template <typename In, typename Out, bool kBias, bool kCap, bool kEntropy>
__global__ void __launch_bounds__(kThreads, kResident<In>)
    dlogits_kernel(Chunk c, Transform<Accumulate<In>> f, Upstream<Accumulate<In>> up) {
    using T = Accumulate<In>;
    using Tiles = Tile<In, Out>;
    constexpr int kGroup = Tiles::kGroup, kGroups = Tiles::kGroups;
    const int64_t i = blockIdx.x;
    In* row = static_cast<In*>(c.logits) + i * c.row_stride;
    Out* out = reinterpret_cast<Out*>(row);
    const auto* bias = static_cast<const T*>(c.bias);
    const bool aligned = is_aligned(row);
    const RowGradient<T> g = row_gradient<kEntropy>(c, up, i);
    if (g.grad_logprob == T(0) && g.grad_entropy == T(0))  // a dead row stays dead even where its logits are NaN
        return zero_row(out, c.vocab, aligned);

    const auto gradient_of = [&](In x, int64_t k) {
        return class_gradient<kCap, kEntropy>(raw_logit<kBias>(x, bias, k), f, g);
    };
    const auto finish = [&](const Group<In, kGroup>& in, int64_t k) {
        Group<Out, kGroup> result;
#pragma unroll
        for (int e = 0; e < kGroup; ++e) narrow(result.x[e], gradient_of(in.x[e], k + e));
        store_group(out + k, result, aligned);
    };
    const auto barrier = [] {
        if constexpr (Tiles::kOverlaps) __syncthreads();
    };

    const int64_t target = c.targets[i];
    const T raw_target = raw_logit<kBias>(row[target], bias, target);
    __syncthreads();  // read by every thread before any of them overwrites it
    int64_t begin = 0;
    for (; begin + Tiles::kWidth <= c.vocab; begin += Tiles::kWidth) {
        Group<In, kGroup> in[kGroups];
        const int64_t first = begin + threadIdx.x * kGroup;
#pragma unroll
        for (int u = 0; u < kGroups; ++u) load_group(in[u], row + first + u * Tiles::kStep, aligned);
        barrier();
#pragma unroll
        for (int u = 0; u < kGroups; ++u) finish(in[u], first + u * Tiles::kStep);
    }
    for (; begin + kGroup <= c.vocab; begin += Tiles::kStep) {  // the same trip count for every thread
        const int64_t k = begin + threadIdx.x * kGroup;
        const bool live = k + kGroup <= c.vocab;
        Group<In, kGroup> in;
        if (live) load_group(in, row + k, aligned);
        barrier();
        if (live) finish(in, k);
    }
    const int64_t last = c.vocab - c.vocab % kGroup + threadIdx.x;  // fewer elements than one group are left
    In x{};
    if (last < c.vocab) x = row[last];
    barrier();
    if (last < c.vocab) narrow(out[last], gradient_of(x, last));

    __syncthreads();
    if (threadIdx.x == 0) narrow(out[target], target_gradient<kCap, kEntropy>(raw_target, f, g));
}

template <typename In, typename Out>
void launch_for(const Queue& queue, const Chunk& c, const void* grad_logprob, const void* grad_entropy) {
    using T = Accumulate<In>;
    const Upstream<T> up{static_cast<const T*>(grad_logprob), static_cast<const T*>(grad_entropy),
                         static_cast<T>(c.scale / c.temperature)};
    specialise(c, grad_entropy != nullptr, [&](auto bias, auto cap, auto entropy) {
        launch("dlogits",
               dlogits_kernel<In, Out, decltype(bias)::value, decltype(cap)::value, decltype(entropy)::value>, queue,
               c.rows, kThreads, c, make_transform<T>(c), up);
    });
}

}  // namespace

void dlogits(const Queue& queue, const Chunk& c, const void* grad_logprob, const void* grad_entropy, LogitType out) {
    const auto run = [&](auto in_tag, auto out_tag) {
        launch_for<decltype(in_tag), decltype(out_tag)>(queue, c, grad_logprob, grad_entropy);
    };
    if (c.type == LogitType::kFloat && out == LogitType::kBFloat16) return run(float{}, BFloat16{});
    if (c.type == LogitType::kFloat && out == LogitType::kHalf) return run(float{}, Half{});
    if (c.type != out) throw std::runtime_error("dlogits writes the logits' own type, or bf16 or fp16 over fp32");
    switch (c.type) {
        case LogitType::kFloat: return run(float{}, float{});
        case LogitType::kBFloat16: return run(BFloat16{}, BFloat16{});
        case LogitType::kHalf: return run(Half{}, Half{});
        case LogitType::kDouble: return run(double{}, double{});
    }
}

}  // namespace bgpo::cuda
