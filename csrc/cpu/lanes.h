// What the mask kernels do with whole vector registers, each with a scalar loop for the tail and for other machines.
//
// make_keys     philox_rounds over SIMD lanes where the instruction set multiplies 32-bit words into 64-bit lanes
//               (AVX2: 4 counters an instruction, AVX-512: 8). Compilers do not find this by themselves.
// keep_between, keep_masked   stream compaction: AVX-512 packs the wanted lanes of a register in one instruction.
#pragma once

#include "../bgpo/stream.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "engine.h"

namespace bgpo {

#if defined(__AVX512F__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

#if defined(__AVX2__)

// One counter word a 64-bit lane. The upper halves are never read by the multiplier, so `lo` is left unmasked.
typedef uint64_t Lanes __attribute__((vector_size(8 * kLanes)));

template <>
struct Multiply<Lanes> {
    static inline __attribute__((always_inline)) WideProduct<Lanes> wide(uint32_t constant, Lanes word) {
#if defined(__AVX512F__)
        const Lanes product = (Lanes)_mm512_mul_epu32((__m512i)word, _mm512_set1_epi64(constant));
#else
        const Lanes product = (Lanes)_mm256_mul_epu32((__m256i)word, _mm256_set1_epi64x(constant));
#endif
        return {product >> 32, product};
    }
};

#endif

}  // namespace bgpo

namespace bgpo::cpu {
namespace {

void make_keys(int64_t length, uint32_t j, int64_t sample_id, uint64_t seed, uint64_t* keys) {
    int64_t p = 0;
#if defined(__AVX2__)
    const Words c = stream_counter(0, j, sample_id, kSelectionKeys);
    const Lanes zero = {};
    Lanes position = {};
    for (int lane = 0; lane < kLanes; ++lane) position[lane] = lane;
    for (; p + kLanes <= length; p += kLanes, position += kLanes) {
        Lanes x = position, y = zero + c.y, z = zero + c.z, w = zero + c.w;
        philox_rounds(x, y, z, w, seed);
        const Lanes key = (x << 32) | (y & 0xFFFFFFFFu);
        std::memcpy(keys + p, &key, sizeof(key));
    }
#endif
    for (; p < length; ++p)
        keys[p] = selection_key(stream_words(static_cast<uint32_t>(p), j, sample_id, kSelectionKeys, seed));
}

// Nearest key at or below a point of [0, 2^64]; fp64 holds such points to 2^-53 of the range, far inside the bracket.
inline uint64_t to_key(double x) { return x >= 18446744073709551615.0 ? ~uint64_t{0} : static_cast<uint64_t>(x); }

// How many keys are below `bound`, and how many equal it.
inline int64_t count_below(const uint64_t* keys, int64_t length, uint64_t bound) {
    int64_t i = 0, found = 0;
#if defined(__AVX512F__)
    const __m512i high = _mm512_set1_epi64(bound);
    for (; i + kLanes <= length; i += kLanes)
        found += __builtin_popcount(_mm512_cmplt_epu64_mask(_mm512_loadu_si512(keys + i), high));
#endif
    for (; i < length; ++i) found += keys[i] < bound;
    return found;
}

inline int64_t count_equal(const uint64_t* keys, int64_t length, uint64_t key) {
    int64_t found = 0;
    for (int64_t i = 0; i < length; ++i) found += keys[i] == key;
    return found;
}

// Packs the keys in [first, last] to the front of `out` (may be `keys` itself); returns how many. Every step writes a
// whole register at the next free place and keeps the wanted lanes, so `out` needs kLanes of room beyond `length`.
inline int64_t keep_between(const uint64_t* keys, int64_t length, uint64_t first, uint64_t last, uint64_t* out) {
    int64_t i = 0, kept = 0;
#if defined(__AVX512F__)
    const __m512i low = _mm512_set1_epi64(first), high = _mm512_set1_epi64(last);
    for (; i + kLanes <= length; i += kLanes) {
        const __m512i key = _mm512_loadu_si512(keys + i);
        const __mmask8 wanted = _mm512_cmpge_epu64_mask(key, low) & _mm512_cmple_epu64_mask(key, high);
        _mm512_storeu_si512(out + kept, _mm512_maskz_compress_epi64(wanted, key));
        kept += __builtin_popcount(wanted);
    }
#endif
    for (; i < length; ++i) {
        const uint64_t key = keys[i];
        out[kept] = key;
        kept += key >= first && key <= last;
    }
    return kept;
}

// Packs row indices and clean tokens of the masked positions of a contiguous response, as long as a whole register
// still fits into the segment's `count` places; returns the next position and leaves the number kept in `at`.
inline int64_t keep_masked(const Response& where, const int64_t* clean, const int64_t* noisy, int64_t mask_id,
                           int64_t base, int64_t count, int64_t* rows, int64_t* targets, int64_t& at) {
    int64_t p = 0;
#if defined(__AVX512F__)
    const __m512i mask = _mm512_set1_epi64(mask_id), step = _mm512_set1_epi64(kLanes);
    __m512i row = _mm512_add_epi64(_mm512_set1_epi64(base + where.first), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
    for (; p + kLanes <= where.length && at + kLanes <= count; p += kLanes, row = _mm512_add_epi64(row, step)) {
        const int64_t t = where.first + p;
        const __mmask8 masked = _mm512_cmpeq_epi64_mask(_mm512_loadu_si512(noisy + t), mask);
        _mm512_storeu_si512(rows + at, _mm512_maskz_compress_epi64(masked, row));
        _mm512_storeu_si512(targets + at, _mm512_maskz_compress_epi64(masked, _mm512_loadu_si512(clean + t)));
        at += __builtin_popcount(masked);
    }
#endif
    return p;
}

}  // namespace
}  // namespace bgpo::cpu
