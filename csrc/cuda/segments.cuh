// The sum over a segment by one CTA, in one order wherever it is needed: old and new log-probabilities of equal weights then
// agree to the last bit.
#pragma once

#include "launch.cuh"

namespace bgpo::cuda {

constexpr int kThreads = 256;

// weight * sum of values[0 : count], rounded once, for every thread. Thread t adds values t, t + 256, ... in fp64; then come
// the lanes of a warp in a fixed tree, and the warps in order.
template <typename T>
__device__ T weighted_sum(const T* values, int64_t count, float weight) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ double of_warp[kWarps];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += static_cast<double>(values[i]);
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(kAllLanes, sum, step);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
    __syncthreads();
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += of_warp[w];
    return static_cast<T>(static_cast<double>(weight) * total);
}

}  // namespace bgpo::cuda
