// Gradient of a chunk of raw logits [C, V], written over them (softmax.h): same dtype, or bf16/fp16 over fp32.
//
// dlogits         for any upstream gradient per row.
// bound_dlogits   for BGPO's loss: a CTA finds its row's segment, adds up the segment's log-probabilities, takes the bound's
//                 coefficient (bound.h) and goes on as above, so that nothing else runs between the statistics and the
//                 GEMMs. Every row of a segment repeats the sum: 4 bytes from L2 for each of its rows, against 6V of the
//                 row itself (1% at 2000 rows a segment). On-policy only a segment's first row needs it, for the loss.
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
__device__ __forceinline__ RowGradient<T> row_gradient(const Chunk& c, int64_t i, T grad_logprob, T grad_entropy,
                                                       T chain) {
    const T* stats = static_cast<const T*>(c.stats) + i;
    const T sum = stats[c.stats_stride];
    return {stats[0],
            T(1) / sum,
            grad_logprob,
            grad_entropy,
            static_cast<T>(::log(sum)),
            kEntropy ? stats[3 * c.stats_stride] : T(0),
            chain};
}

// The segment that holds a row: the last one that begins at or before it.
__device__ __forceinline__ int64_t segment_of(const ChunkSegments& b, int64_t row) {
    int64_t lo = 0, hi = b.segments - 1;
    while (lo < hi) {
        const int64_t mid = (lo + hi + 1) >> 1;
        if (b.offsets[mid] <= row) lo = mid; else hi = mid - 1;
    }
    return lo;
}

// d loss / d log-probability of row i. A segment's first row also writes the segment's sum.
template <typename T>
__device__ __forceinline__ T bound_gradient(const Chunk& c, const ChunkSegments& b, int64_t i) {
    const int64_t row = b.begin + i, s = segment_of(b, row), start = b.offsets[s], segment = b.first + s;
    const int64_t sequence = segment / b.samples;
    const T length = b.length ? static_cast<T>(b.length[sequence]) : T(1);
    T d = 0;
    if (b.old || row == start) {
        const T* logprob = static_cast<const T*>(c.stats) + 2 * c.stats_stride + (start - b.begin);
        const T sum = weighted_sum(logprob, b.offsets[s + 1] - start, b.weight[s]);
        if (b.old) d = (sum - static_cast<const T*>(b.old)[segment]) / length;
        if (row == start && threadIdx.x == 0) static_cast<T*>(b.sums)[s] = sum;
    }
    const T slope = bound_term(d, static_cast<const T*>(b.advantages)[sequence], length, b.clip).slope;
    const T gradient = slope / -static_cast<T>(b.divisor) * static_cast<T>(b.weight[s]);
    if (threadIdx.x == 0) static_cast<T*>(b.row_grad)[i] = gradient;
    return gradient;
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

template <typename In, typename Out, bool kBias, bool kCap, bool kEntropy, typename T>
__device__ __forceinline__ void write_row(const Chunk& c, int64_t i, const Transform<T>& f, const RowGradient<T>& g) {
    using Tiles = Tile<In, Out>;
    constexpr int kGroup = Tiles::kGroup, kGroups = Tiles::kGroups;
    In* row = static_cast<In*>(c.logits) + i * c.row_stride;
    Out* out = reinterpret_cast<Out*>(row);
    const auto* bias = static_cast<const T*>(c.bias);
    const bool aligned = is_aligned(row);
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

template <typename In, typename Out, bool kBias, bool kCap, bool kEntropy>
__global__ void __launch_bounds__(kThreads, kResident<In>)
    dlogits_kernel(Chunk c, Transform<Accumulate<In>> f, Upstream<Accumulate<In>> up) {
    using T = Accumulate<In>;
    const int64_t i = blockIdx.x;
    const T grad_entropy = kEntropy ? up.grad_entropy[i] : T(0);
    write_row<In, Out, kBias, kCap, kEntropy>(
        c, i, f, row_gradient<kEntropy>(c, i, up.grad_logprob[i], grad_entropy, up.chain));
}

template <typename In, typename Out, bool kBias, bool kCap>
__global__ void __launch_bounds__(kThreads, kResident<In>)
    bound_dlogits_kernel(Chunk c, Transform<Accumulate<In>> f, ChunkSegments b, Accumulate<In> chain) {
    using T = Accumulate<In>;
    const int64_t i = blockIdx.x;
    const T grad_logprob = bound_gradient<T>(c, b, i);
    write_row<In, Out, kBias, kCap, false>(c, i, f, row_gradient<false>(c, i, grad_logprob, T(0), chain));
}

template <typename T>
T chain_of(const Chunk& c) { return static_cast<T>(c.scale / c.temperature); }

// call(in, out) with a value of each type.
template <typename F>
void with_types(const Chunk& c, LogitType out, F&& call) {
    if (c.type == LogitType::kFloat && out == LogitType::kBFloat16) return call(float{}, BFloat16{});
    if (c.type == LogitType::kFloat && out == LogitType::kHalf) return call(float{}, Half{});
    if (c.type != out) throw std::runtime_error("dlogits writes the logits' own type, or bf16 or fp16 over fp32");
    switch (c.type) {
        case LogitType::kFloat: return call(float{}, float{});
        case LogitType::kBFloat16: return call(BFloat16{}, BFloat16{});
        case LogitType::kHalf: return call(Half{}, Half{});
        case LogitType::kDouble: return call(double{}, double{});
    }
}

}  // namespace

void dlogits(const Queue& queue, const Chunk& c, const void* grad_logprob, const void* grad_entropy, LogitType out) {
    with_types(c, out, [&](auto in_tag, auto out_tag) {
        using In = decltype(in_tag);
        using T = Accumulate<In>;
        const Upstream<T> up{static_cast<const T*>(grad_logprob), static_cast<const T*>(grad_entropy), chain_of<T>(c)};
        specialise(c, grad_entropy != nullptr, [&](auto bias, auto cap, auto entropy) {
            launch("dlogits",
                   dlogits_kernel<In, decltype(out_tag), decltype(bias)::value, decltype(cap)::value,
                                  decltype(entropy)::value>,
                   queue, c.rows, kThreads, c, make_transform<T>(c), up);
        });
    });
}

void bound_dlogits(const Queue& queue, const Chunk& c, const ChunkSegments& segments, LogitType out) {
    with_types(c, out, [&](auto in_tag, auto out_tag) {
        using In = decltype(in_tag);
        using T = Accumulate<In>;
        specialise(c, false, [&](auto bias, auto cap, auto) {
            launch("bound_dlogits",
                   bound_dlogits_kernel<In, decltype(out_tag), decltype(bias)::value, decltype(cap)::value>, queue,
                   c.rows, kThreads, c, make_transform<T>(c), segments, chain_of<T>(c));
        });
    });
}

}  // namespace bgpo::cuda
