// Choosing the l smallest of L distinct-enough 64-bit keys without a sort: most-significant-digit radix selection.
//
// Eight passes of 8 bits at most; each counts the digits of the keys that share the prefix found so far and walks the
// 256 counters to the digit that holds the l-th key. It stops as soon as the whole bucket is wanted, after two or three
// passes for L below 64k. Equal keys (probability 3e-11 at L = 32768) are filled in position order: always exactly l.
#pragma once

#include "common.h"

namespace bgpo {

constexpr int kRadixBits = 8;
constexpr int kRadixSize = 1 << kRadixBits;

constexpr uint32_t kAllTies = 0xFFFFFFFFu;

// A key is selected when it is below `key`, or equal to it and among the first `ties` such in position order.
struct SelectionThreshold {
    uint64_t key;
    uint32_t ties;
};

struct RadixState {
    uint64_t prefix = 0;     // digits fixed so far
    int shift = 64;          // bits not yet fixed
    uint32_t remaining = 0;  // rank (from 1) of the wanted key among the keys with this prefix
    bool done = false;
};

BGPO_HD bool radix_matches(const RadixState& s, uint64_t key) { return s.shift == 64 || (key >> s.shift) == s.prefix; }
BGPO_HD uint32_t radix_digit(const RadixState& s, uint64_t key) {
    return static_cast<uint32_t>(key >> (s.shift - kRadixBits)) & (kRadixSize - 1);
}

// Fixes the next digit: the one whose bucket of `size` matching keys, after the `below` smaller ones, holds the wanted.
BGPO_HD void radix_fix(RadixState& s, uint32_t digit, uint32_t below, uint32_t size) {
    s.remaining -= below;
    s.shift -= kRadixBits;
    s.prefix = (s.prefix << kRadixBits) | digit;
    s.done = s.shift == 0 || size == s.remaining;
}

// Consumes one histogram of digits (of the matching keys) and fixes the next digit.
BGPO_HD void radix_advance(RadixState& s, const uint32_t* histogram) {
    uint32_t digit = 0, below = 0;
    while (below + histogram[digit] < s.remaining) below += histogram[digit++];
    radix_fix(s, digit, below, histogram[digit]);
}

// After `done`: the whole last bucket is wanted (early stop), or all 64 bits are known and ties are counted.
BGPO_HD SelectionThreshold radix_threshold(const RadixState& s) {
    if (s.shift == 0) return {s.prefix, s.remaining};
    return {(s.prefix << s.shift) | ((uint64_t{1} << s.shift) - 1), kAllTies};
}

}  // namespace bgpo
