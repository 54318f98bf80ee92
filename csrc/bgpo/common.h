// Shared by the CPU engine and the CUDA kernels: the arithmetic of every op lives in this folder, once, as functions
// that compile for host and device. No header here includes torch, Python or the CUDA runtime.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define BGPO_HD __host__ __device__ __forceinline__
#else
#define BGPO_HD inline __attribute__((always_inline))
#endif

namespace bgpo {

// Plain bit casts that both nvcc and a host compiler fold to nothing.
BGPO_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
#endif
}

BGPO_HD float bits_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(u);
#else
    float x;
    std::memcpy(&x, &u, 4);
    return x;
#endif
}

}  // namespace bgpo
