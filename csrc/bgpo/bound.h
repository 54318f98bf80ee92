// BGPO's lower bound per Monte Carlo sample (arXiv 2510.11683), with PPO-style clipping as an option.
//
//   d = (ell - ell_old) / length
//   A >= 0:  term = A min(1 + d, 1 + clip_high)                      slope = A / length          or 0 where clipped
//   A <  0:  term = A min(max(e^d, 1 - clip_low), dual_clip)         slope = A e^d / length      or 0 where clipped
//
// slope = d term / d ell. A clip that is off is +inf. 1 + d is never formed through a logarithm.
#pragma once

#include <cmath>

#include "common.h"

namespace bgpo {

struct Clip {
    double low, high, dual;
};

template <typename T>
struct BoundTerm {
    T term, slope;
};

template <typename T>
BGPO_HD BoundTerm<T> bound_term(T d, T advantage, T length, const Clip& clip) {
    if (advantage >= T(0)) {
        const T ratio = T(1) + d, cap = T(1) + static_cast<T>(clip.high);
        if (ratio > cap) return {advantage * cap, T(0)};
        return {advantage * ratio, advantage / length};  // a NaN ratio stays one
    }
    const T ratio = ::exp(d), floor = T(1) - static_cast<T>(clip.low), cap = static_cast<T>(clip.dual);
    if (ratio < floor) return {advantage * floor, T(0)};
    if (ratio > cap) return {advantage * cap, T(0)};
    return {advantage * ratio, advantage * ratio / length};
}

}  // namespace bgpo
