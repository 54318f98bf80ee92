// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// A pure function of (counter, key): no state, so every mask bit can be recomputed anywhere, in any order.
//
// The rounds are written over a word type W: uint32_t for one counter, or a SIMD vector that holds one counter a lane
// (csrc/cpu/philox_lanes.h). A type brings a specialisation of Multiply: constant times word -> both halves.
#pragma once

#include "common.h"

namespace bgpo {

struct Words {
    uint32_t x, y, z, w;
};

template <typename W>
struct WideProduct {
    W hi, lo;
};

template <typename W>
struct Multiply;

template <>
struct Multiply<uint32_t> {
    static BGPO_HD WideProduct<uint32_t> wide(uint32_t constant, uint32_t word) {
        const uint64_t product = static_cast<uint64_t>(constant) * word;
        return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
    }
};

template <typename W>
BGPO_HD void philox_rounds(W& x, W& y, W& z, W& w, uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int round = 0; round < 10; ++round) {
        const auto a = Multiply<W>::wide(0xD2511F53u, x), b = Multiply<W>::wide(0xCD9E8D57u, z);
        x = b.hi ^ y ^ k0;
        y = b.lo;
        z = a.hi ^ w ^ k1;
        w = a.lo;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

BGPO_HD Words philox(Words c, uint64_t seed) {
    philox_rounds(c.x, c.y, c.z, c.w, seed);
    return c;
}

}  // namespace bgpo
