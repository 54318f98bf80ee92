// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// A pure function of (counter, key): no state, so every mask bit can be recomputed anywhere, in any order.
//
// A round is written over the types of its four words: uint32_t, or a SIMD type that holds one counter a lane
// (csrc/cpu/lanes.h). Where counters differ in their first word alone the other three are plain integers, and so are
// the products that depend only on them: the types carry this through the first rounds, and 17 of the 20 products a
// counter are left. A type brings a specialisation of Multiply (constant times word -> both halves) and `^`.
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

template <typename X, typename Y, typename Z, typename W>
struct PhiloxState {
    X x;
    Y y;
    Z z;
    W w;
};

// Round number `round` (from 0) under the key `seed`. States go by value: GCC keeps packs of registers in memory when
// they are passed by reference, and that costs tenfold.
template <typename X, typename Y, typename Z, typename W>
BGPO_HD auto philox_round(PhiloxState<X, Y, Z, W> s, uint64_t seed, uint32_t round) {
    const uint32_t k0 = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
    const uint32_t k1 = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
    const WideProduct<X> a = Multiply<X>::wide(0xD2511F53u, s.x);
    const WideProduct<Z> b = Multiply<Z>::wide(0xCD9E8D57u, s.z);
    const auto x = b.hi ^ s.y ^ k0;
    const auto z = a.hi ^ s.w ^ k1;
    return PhiloxState<std::decay_t<decltype(x)>, Z, std::decay_t<decltype(z)>, X>{x, b.lo, z, a.lo};
}

// After three rounds every word depends on every counter word, and the types no longer change.
template <typename X, typename Y, typename Z, typename W>
BGPO_HD auto philox_rounds(PhiloxState<X, Y, Z, W> counter, uint64_t seed) {
    auto s = philox_round(philox_round(philox_round(counter, seed, 0), seed, 1), seed, 2);
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif defined(__GNUC__)
#pragma GCC unroll 7
#endif
    for (uint32_t round = 3; round < 10; ++round) s = philox_round(s, seed, round);
    return s;
}

BGPO_HD Words philox(const Words& c, uint64_t seed) {
    const auto s = philox_rounds(PhiloxState<uint32_t, uint32_t, uint32_t, uint32_t>{c.x, c.y, c.z, c.w}, seed);
    return {s.x, s.y, s.z, s.w};
}

}  // namespace bgpo
