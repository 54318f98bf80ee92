// The conversions of CUDA's bfloat16 that the kernels use.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
    unsigned short bits;
};

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {  // to nearest even; NaN as the hardware writes it
    uint32_t u;
    std::memcpy(&u, &x, 4);
    if (x != x) return {0x7FFF};
    return {static_cast<unsigned short>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16)};
}
