// Row statistics of a softmax over transformed logits, and the gradient of log-probability and entropy.
//
//   a = scale * (raw + bias);  a = cap * tanh(a / cap) if cap > 0;  z = a / temperature
//   m = max z, s = sum exp(z - m), t = sum exp(z - m) (z - m)
//   logprob = min(z_y - m, 0) - log s        entropy = log s - t / s
//   d/dz_k  = g (1[k = y] - p_k) - h p_k ((z_k - m) - log s + entropy)
//
// logprob <= 0 by construction: s >= 1 because the maximum contributes exactly 1. m starts at -inf; an infinite base is
// replaced by 0 so that no exp(-inf + inf) is formed, and a NaN logit reaches the sum, never a comparison alone.
#pragma once

#include <cmath>

#include "common.h"

namespace bgpo {

constexpr float kExpLow = -86.98f;  // below: exp is under 2^-125, flushed to 0
constexpr float kExpHigh = 88.72283f;

#if !defined(__CUDA_ARCH__)
// a b + c, fused where the machine can. Host code is compiled without contraction of its own (see rounded_product), so a
// polynomial asks for it here.
BGPO_HD float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
#endif

// exp within 1 ulp; on the host a polynomial that vectorises (Cody-Waite reduction, degree 6). On the device the library's:
// not flushed, because doing so becomes a branch around every exp.
BGPO_HD float exp_(float x) {
#if defined(__CUDA_ARCH__)
    return expf(x);
#else
    const float c = x > kExpHigh ? kExpHigh : x;  // a NaN passes; below kExpLow the result is discarded
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
    const float shifted = multiply_add(c, 1.44269504088896341f, magic);
    const float n = shifted - magic;
    const float r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, c));
    float p = 1.9875691500e-4f;
    p = multiply_add(p, r, 1.3981999507e-3f);
    p = multiply_add(p, r, 8.3334519073e-3f);
    p = multiply_add(p, r, 4.1665795894e-2f);
    p = multiply_add(p, r, 1.6666665459e-1f);
    p = multiply_add(p, r, 5.0000001201e-1f);
    p = multiply_add(p, r * r, r) + 1.0f;
    const uint32_t exponent = (float_bits(shifted) - float_bits(magic) + 126u) << 23;  // 2^(n-1): n = 128 would overflow
    const float y = (p + p) * bits_float(exponent);
    return x < kExpLow ? 0.0f : y;
#endif
}
BGPO_HD double exp_(double x) { return ::exp(x); }

BGPO_HD float tanh_(float x) {
#if defined(__CUDA_ARCH__)
    return tanhf(x);
#else
    const float a = x < 0 ? -x : x;
    const float e = exp_(a + a);
    const float large = 1.0f - 2.0f / (e + 1.0f);
    const float q = x * x;  // odd polynomial where 1 - 2/(e+1) would cancel
    float p = -5.70498872745e-3f;
    p = multiply_add(p, q, 2.06390887954e-2f);
    p = multiply_add(p, q, -5.37397155531e-2f);
    p = multiply_add(p, q, 1.33314422036e-1f);
    p = multiply_add(p, q, -3.33332819422e-1f);
    const float small = multiply_add(x * q, p, x);
    const float signed_large = x < 0 ? -large : large;
    return a < 0.625f ? small : signed_large;  // a NaN takes the second branch and stays a NaN
#endif
}
BGPO_HD double tanh_(double x) { return ::tanh(x); }

template <typename T>
struct Transform {
    T scale = 1, cap = 0, inv_temperature = 1;  // cap 0: off
};

template <typename T>
BGPO_HD T capped_tanh(T raw, const Transform<T>& f) { return tanh_(raw * f.scale / f.cap); }

// A product that no compiler may contract into a later subtraction: z minus the maximum of the z must be exactly 0 at the
// maximum, or probabilities would be off by a rounding of z itself (5e-5 at z = 200) and no longer sum to 1. Hosts are
// compiled with -ffp-contract=off; a CUDA compiler is told here.
BGPO_HD float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}
BGPO_HD double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
    return __dmul_rn(a, b);
#else
    return a * b;
#endif
}

// z from tanh(a / cap).
template <typename T>
BGPO_HD T from_tanh(T tanh_a, const Transform<T>& f) { return rounded_product(f.cap * tanh_a, f.inv_temperature); }

template <bool kCap, typename T>
BGPO_HD T transformed(T raw, const Transform<T>& f) {
    if constexpr (kCap) return from_tanh(capped_tanh(raw, f), f);
    else return rounded_product(raw, f.scale * f.inv_temperature);
}

// Running (max, sum, weighted sum) of a row; `Acc` is the type of the sums (fp64 costs nothing per block on a CPU).
template <typename T, typename Acc>
struct RowState {
    T max = -INFINITY;
    Acc sum = 0, weighted = 0;
};

// The finite number to subtract before exp.
template <typename T>
BGPO_HD T exp_base(T max) { return max == -INFINITY ? T(0) : max; }

// Moves the sums to a larger maximum: sum exp(z - M) = exp(m - M) sum exp(z - m), and likewise for the weighted sum.
template <typename T, typename Acc>
BGPO_HD void raise_max(RowState<T, Acc>& r, T max) {
    if (!(max > r.max)) return;
    if (r.sum != Acc(0)) {
        const T shift = r.max - max;
        const Acc factor = static_cast<Acc>(exp_(shift));
        r.weighted = factor == Acc(0) ? Acc(0) : factor * (r.weighted + static_cast<Acc>(shift) * r.sum);
        r.sum = factor * r.sum;
    }
    r.max = max;
}

template <typename T, typename Acc>
BGPO_HD void merge(RowState<T, Acc>& r, RowState<T, Acc> other) {
    const T max = other.max > r.max ? other.max : r.max;
    raise_max(r, max);
    raise_max(other, max);
    r.sum += other.sum;
    r.weighted += other.weighted;
}

template <typename T>
BGPO_HD T log_probability(T z_target, T max, T sum) {
    const T shifted = z_target - max;
    return (shifted > T(0) ? T(0) : shifted) - ::log(sum);
}

// What the gradient needs of a row.
template <typename T>
struct RowGradient {
    T max, inv_sum, grad_logprob, grad_entropy, log_sum, entropy, chain;  // chain = scale / temperature
};

// Gradient of the raw logit for a class that is not the target; the target's adds `chain' * g` (see target_gradient).
template <bool kCap, bool kEntropy, typename T>
BGPO_HD T class_gradient(T raw, const Transform<T>& f, const RowGradient<T>& row) {
    T z, chain = row.chain;
    if constexpr (kCap) {
        const T tanh_a = capped_tanh(raw, f);
        z = from_tanh(tanh_a, f);
        chain *= T(1) - tanh_a * tanh_a;
    } else {
        z = transformed<false>(raw, f);
    }
    const T shifted = z - row.max;
    const T p = exp_(shifted) * row.inv_sum;
    T grad = -row.grad_logprob * p;
    if constexpr (kEntropy) {
        const T centred = shifted - row.log_sum + row.entropy;
        grad -= p == T(0) ? T(0) : row.grad_entropy * p * centred;
    }
    return chain * grad;
}

template <bool kCap, bool kEntropy, typename T>
BGPO_HD T target_gradient(T raw, const Transform<T>& f, const RowGradient<T>& row) {
    T chain = row.chain;
    if constexpr (kCap) {
        const T tanh_a = capped_tanh(raw, f);
        chain *= T(1) - tanh_a * tanh_a;
    }
    return class_gradient<kCap, kEntropy>(raw, f, row) + chain * row.grad_logprob;
}

}  // namespace bgpo
