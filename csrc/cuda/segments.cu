// Segment sums and the bound: a few numbers per sample.
//
// segment_sum  out_s = weight_s * sum values[offsets_s : offsets_s+1]. N adds, 4N bytes read (8N for fp64). One CTA per
//              segment, in the order of segments.cuh.
// bound        bound.h per (sequence, sample). ~10 flops and at most 16 bytes each in fp32; in the logprob's own dtype.
#include "segments.cuh"

namespace bgpo::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    segment_sum_kernel(const T* values, const int64_t* offsets, const float* weight, T* out) {
    const int64_t s = blockIdx.x;
    const T sum = weighted_sum(values + offsets[s], offsets[s + 1] - offsets[s], weight[s]);
    if (threadIdx.x == 0) out[s] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    bound_kernel(const T* logprob, const T* advantages, const T* old, const float* length, int64_t size, int64_t n,
                 Clip clip, T* term, T* slope) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= size) return;
    const int64_t b = i / n;
    const T divisor = length ? static_cast<T>(length[b]) : T(1);
    const T d = (logprob[i] - (old ? old[i] : logprob[i])) / divisor;  // on-policy 0, or NaN: it must show
    const auto result = bound_term(d, advantages[b], divisor, clip);
    term[i] = result.term;
    slope[i] = result.slope;
}

}  // namespace

template <typename T>
void segment_sum(const Queue& queue, const T* values, const int64_t* offsets, const float* weight, int64_t segments,
                 T* out) {
    launch("segment_sum", segment_sum_kernel<T>, queue, segments, kThreads, values, offsets, weight, out);
}

template <typename T>
void bound(const Queue& queue, const T* logprob, const T* advantages, const T* old, const float* length,
           int64_t batch, int64_t n, const Clip& clip, T* term, T* slope) {
    launch("bound", bound_kernel<T>, queue, blocks_for(batch * n, kThreads), kThreads, logprob, advantages, old, length,
           batch * n, n, clip, term, slope);
}

template void segment_sum(const Queue&, const float*, const int64_t*, const float*, int64_t, float*);
template void segment_sum(const Queue&, const double*, const int64_t*, const float*, int64_t, double*);
template void bound(const Queue&, const float*, const float*, const float*, const float*, int64_t, int64_t, const Clip&,
                    float*, float*);
template void bound(const Queue&, const double*, const double*, const double*, const float*, int64_t, int64_t,
                    const Clip&, double*, double*);

}  // namespace bgpo::cuda
