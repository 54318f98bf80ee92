// What the mask kernels do with whole vector registers, each with a scalar loop for the tail and for other machines.
//
// make_words     word 0 of the selection keys, Philox over SIMD lanes where the instruction set multiplies 32-bit words
//                into 64-bit lanes (AVX2: 4 counters an instruction, AVX-512: 8). Compilers do not find this.
// split_words, write_run   stream compaction: AVX-512 packs the wanted lanes of a register in one instruction.
#pragma once

#include "../bgpo/stream.h"

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own headers (GCC bug 105593)
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "engine.h"

namespace bgpo {

#if defined(__AVX2__)

#if defined(__AVX512F__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

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

// Several registers in step. One chain of ten rounds is some 55 cycles long, and the scheduler of a CPU sees only two
// or three of them ahead when they come one after the other.
template <int kRegisters>
struct Pack {
    Lanes part[kRegisters];

    friend inline __attribute__((always_inline)) Pack operator^(Pack a, Pack b) {
        for (int i = 0; i < kRegisters; ++i) a.part[i] ^= b.part[i];
        return a;
    }
    friend inline __attribute__((always_inline)) Pack operator^(Pack a, uint32_t b) {
        for (int i = 0; i < kRegisters; ++i) a.part[i] ^= static_cast<uint64_t>(b);
        return a;
    }
    friend inline __attribute__((always_inline)) Pack operator^(uint32_t a, Pack b) { return b ^ a; }
};

template <int kRegisters>
struct Multiply<Pack<kRegisters>> {
    static inline __attribute__((always_inline)) WideProduct<Pack<kRegisters>> wide(uint32_t constant,
                                                                                    Pack<kRegisters> word) {
        WideProduct<Pack<kRegisters>> r;
        for (int i = 0; i < kRegisters; ++i) {
            const WideProduct<Lanes> p = Multiply<Lanes>::wide(constant, word.part[i]);
            r.hi.part[i] = p.hi;
            r.lo.part[i] = p.lo;
        }
        return r;
    }
};

#endif

}  // namespace bgpo

namespace bgpo::cpu {
namespace {

// Words a buffer must have beyond those in use: what the widest step writes at once.
constexpr int64_t kRoom = 64;

#if defined(__AVX2__)

// Word 0 of the keys of kRegisters * kLanes positions from `position` on. Inlined, so that round keys and uniform
// products leave the loop.
template <int kRegisters>
inline __attribute__((always_inline)) void make_pack(uint32_t position, const Words& counter, uint64_t seed,
                                                     uint32_t* words) {
    typedef uint32_t Narrow __attribute__((vector_size(4 * kLanes)));
    Lanes first = {};
    for (int lane = 0; lane < kLanes; ++lane) first[lane] = position + static_cast<uint64_t>(lane);
    Pack<kRegisters> x;
    for (int i = 0; i < kRegisters; ++i) x.part[i] = first + static_cast<uint64_t>(i * kLanes);
    using State = PhiloxState<Pack<kRegisters>, uint32_t, uint32_t, uint32_t>;
    const auto s = philox_rounds(State{x, counter.y, counter.z, counter.w}, seed);
    for (int i = 0; i < kRegisters; ++i) {
        const Narrow narrow = __builtin_convertvector(s.x.part[i], Narrow);
        std::memcpy(words + i * kLanes, &narrow, sizeof(narrow));
    }
}

#endif

// Word 0 of the selection keys of every position; up to kRoom words beyond them are overwritten.
void make_words(int64_t length, uint32_t j, int64_t sample_id, uint64_t seed, uint32_t* words) {
    const Words counter = stream_counter(0, j, sample_id, kSelectionKeys);
#if defined(__AVX2__)
    constexpr int kRegisters = kRoom / kLanes / (kLanes == 4 ? 4 : 1);  // AVX2 has half the registers, of half the size
    int64_t p = 0;
    for (; p + kRegisters * kLanes <= length; p += kRegisters * kLanes)
        make_pack<kRegisters>(static_cast<uint32_t>(p), counter, seed, words + p);
    for (; p < length; p += kLanes) make_pack<1>(static_cast<uint32_t>(p), counter, seed, words + p);
#else
    for (int64_t p = 0; p < length; ++p)
        words[p] = philox({static_cast<uint32_t>(p), counter.y, counter.z, counter.w}, seed).x;
#endif
}

inline int64_t count_not_above(const uint32_t* words, int64_t length, uint32_t last) {
    int64_t i = 0, found = 0;
#if defined(__AVX512F__)
    const __m512i bound = _mm512_set1_epi32(last);
    for (; i < length; i += 16) {  // a response's words have room beyond their end; those are not counted
        const __mmask16 inside = length - i < 16 ? (1u << (length - i)) - 1 : 0xFFFF;
        found += __builtin_popcount(_mm512_mask_cmple_epu32_mask(inside, _mm512_loadu_si512(words + i), bound));
    }
#endif
    for (; i < length; ++i) found += words[i] <= last;
    return found;
}

struct Split {
    int64_t below, kept;
};

// Counts the words below `first` and packs those in [first, last] to the front of `out` (may be `words` itself, and
// needs kRoom beyond them): every step writes a whole register at the next free place and keeps the wanted lanes.
inline Split split_words(const uint32_t* words, int64_t length, uint32_t first, uint32_t last, uint32_t* out) {
    Split s{0, 0};
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512i low = _mm512_set1_epi32(first), high = _mm512_set1_epi32(last);
    for (; i + 16 <= length; i += 16) {
        const __m512i word = _mm512_loadu_si512(words + i);
        const __mmask16 below = _mm512_cmplt_epu32_mask(word, low);
        const __mmask16 wanted = _mm512_mask_cmple_epu32_mask(_knot_mask16(below), word, high);
        _mm512_storeu_si512(out + s.kept, _mm512_maskz_compress_epi32(wanted, word));
        s.below += __builtin_popcount(below);
        s.kept += __builtin_popcount(wanted);
    }
#endif
    for (; i < length; ++i) {
        const uint32_t word = words[i];
        out[s.kept] = word;
        s.below += word < first;
        s.kept += word >= first && word <= last;
    }
    return s;
}

// Where one segment's results go.
struct Output {
    int64_t* noisy;  // [T] the whole row
    int64_t *rows, *targets;
    int64_t base;  // flat index of noisy[0]
};

// The response of a segment, if it is one run, as far as whole registers go: noisy ids, and the rows and targets of the
// masked positions. A position is masked where (word <= last) != others. Returns the next position; `at` rows are out.
inline int64_t write_run(const Response& where, const uint32_t* words, uint32_t last, bool others, int64_t mask_id,
                         const int64_t* clean, const Output& out, int64_t& at) {
    int64_t p = 0;
#if defined(__AVX512F__)
    const __m512i bound = _mm512_set1_epi32(last), mask = _mm512_set1_epi64(mask_id);
    const __m512i step = _mm512_set1_epi64(8);
    const __mmask16 flip = others ? 0xFFFF : 0;
    __m512i row = _mm512_add_epi64(_mm512_set1_epi64(out.base + where.first), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
    for (; p + 16 <= where.length; p += 16) {
        const __mmask16 masked = _mm512_cmple_epu32_mask(_mm512_loadu_si512(words + p), bound) ^ flip;
        for (int half = 0; half < 2; ++half, row = _mm512_add_epi64(row, step)) {
            const int64_t t = where.first + p + 8 * half;
            const auto here = static_cast<__mmask8>(masked >> (8 * half));
            const int found = __builtin_popcount(here);
            const auto front = static_cast<__mmask8>((1u << found) - 1);  // never beyond the segment's own places
            const __m512i ids = _mm512_loadu_si512(clean + t);
            _mm512_storeu_si512(out.noisy + t, _mm512_mask_mov_epi64(ids, here, mask));
            _mm512_mask_storeu_epi64(out.rows + at, front, _mm512_maskz_compress_epi64(here, row));
            _mm512_mask_storeu_epi64(out.targets + at, front, _mm512_maskz_compress_epi64(here, ids));
            at += found;
        }
    }
#endif
    return p;
}

}  // namespace
}  // namespace bgpo::cpu
