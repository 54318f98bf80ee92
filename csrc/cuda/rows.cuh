// Common to the two row kernels: element types, 16-byte groups, and the way from run-time options to templates.
//
// One CTA per row, kThreads threads. A row is cut into *groups* of consecutive elements, counted from its first
// element, and group g belongs to thread g mod kThreads: which thread adds what, and in which order, follows from V
// and the dtype alone. Alignment only decides how a group is loaded (16-byte words, or element by element where the
// row's address is not a multiple of 16), so a row's bits do not depend on its place in the chunk.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../bgpo/softmax.h"
#include "segments.cuh"

namespace bgpo::cuda {

constexpr int kVectorBytes = 16;

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }

__device__ __forceinline__ void narrow(float& out, float x) { out = x; }
__device__ __forceinline__ void narrow(double& out, double x) { out = x; }
__device__ __forceinline__ void narrow(BFloat16& out, float x) {
    out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void narrow(Half& out, float x) { out.bits = __half_as_ushort(__float2half_rn(x)); }

// What a logit is computed in.
template <typename Logit>
using Accumulate = std::conditional_t<std::is_same_v<Logit, double>, double, float>;

// CTAs on a multiprocessor that the compiler must leave registers for: 48 each in fp32, 64 in fp64, without spills. Five
// CTAs keep 80 KiB of loads in flight, several times latency * bandwidth, and hide one another's barriers.
template <typename Logit>
constexpr int kResident = std::is_same_v<Logit, double> ? 4 : 5;

template <typename E, int N>
struct alignas(kVectorBytes) Group {
    static constexpr int kVectors = N * static_cast<int>(sizeof(E)) / kVectorBytes;
    static_assert(kVectors * kVectorBytes == N * sizeof(E), "a group is whole 16-byte words");
    E x[N];
};

__device__ __forceinline__ bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }

// `p` is not restrict-qualified and no read-only load is used: dlogits overwrites what it loads.
template <typename E, int N>
__device__ __forceinline__ void load_group(Group<E, N>& g, const E* p, bool aligned) {
    if (aligned) {
#pragma unroll
        for (int v = 0; v < Group<E, N>::kVectors; ++v)
            reinterpret_cast<uint4*>(g.x)[v] = reinterpret_cast<const uint4*>(p)[v];
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) g.x[i] = p[i];
    }
}

template <typename E, int N>
__device__ __forceinline__ void store_group(E* p, const Group<E, N>& g, bool aligned) {
    if (aligned) {
#pragma unroll
        for (int v = 0; v < Group<E, N>::kVectors; ++v)
            reinterpret_cast<uint4*>(p)[v] = reinterpret_cast<const uint4*>(g.x)[v];
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) p[i] = g.x[i];
    }
}

// Raw logit k of a row: the head's output plus its bias.
template <bool kBias, typename Logit, typename T>
__device__ __forceinline__ T raw_logit(Logit x, const T* bias, int64_t k) {
    T raw = widen(x);
    if constexpr (kBias) raw += bias[k];
    return raw;
}

template <typename T>
Transform<T> make_transform(const Chunk& c) {
    return {static_cast<T>(c.scale), static_cast<T>(c.softcap), static_cast<T>(1.0 / c.temperature)};
}

// call(bias, cap, entropy) with each option as std::true_type or std::false_type.
template <typename F>
void specialise(const Chunk& c, bool entropy, F&& call) {
    const auto with_cap = [&](auto bias, auto cap) {
        entropy ? call(bias, cap, std::true_type{}) : call(bias, cap, std::false_type{});
    };
    const auto with_bias = [&](auto bias) {
        c.softcap > 0 ? with_cap(bias, std::true_type{}) : with_cap(bias, std::false_type{});
    };
    c.bias ? with_bias(std::true_type{}) : with_bias(std::false_type{});
}

}  // namespace bgpo::cuda
