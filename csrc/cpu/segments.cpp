// Segment sums and the bound: a few numbers per sample, so plain loops in a fixed order.
#include "engine.h"

namespace bgpo::cpu {

template <typename T>
void segment_sum(const T* values, const int64_t* offsets, const float* weight, int64_t segments, T* out) {
    for (int64_t s = 0; s < segments; ++s) {
        double sum = 0;
        for (int64_t i = offsets[s]; i < offsets[s + 1]; ++i) sum += static_cast<double>(values[i]);
        out[s] = static_cast<T>(static_cast<double>(weight[s]) * sum);
    }
}

template <typename T>
void bound(const T* logprob, const T* advantages, const T* old, const float* length, int64_t batch, int64_t n,
           const Clip& clip, T* term, T* slope) {
    for (int64_t b = 0; b < batch; ++b) {
        const T divisor = length ? static_cast<T>(length[b]) : T(1);
        for (int64_t i = b * n; i < (b + 1) * n; ++i) {
            const T d = (logprob[i] - (old ? old[i] : logprob[i])) / divisor;  // on-policy 0, or NaN: it must show
            const auto result = bound_term(d, advantages[b], divisor, clip);
            term[i] = result.term;
            slope[i] = result.slope;
        }
    }
}

template void segment_sum(const float*, const int64_t*, const float*, int64_t, float*);
template void segment_sum(const double*, const int64_t*, const float*, int64_t, double*);
template void bound(const float*, const float*, const float*, const float*, int64_t, int64_t, const Clip&, float*,
                    float*);
template void bound(const double*, const double*, const double*, const float*, int64_t, int64_t, const Clip&, double*,
                    double*);

}  // namespace bgpo::cpu
