// Launching on a stream of someone else's runtime: device guard, 64-bit grid size, errors that name the kernel.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "engine.h"

namespace bgpo::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

inline void check(cudaError_t status, const char* kernel) {
    if (status == cudaSuccess) return;
    (void)cudaGetLastError();  // reported here, so the next launch must not report it again
    throw std::runtime_error(std::string("bgpo_kernels CUDA kernel ") + kernel + ": " + cudaGetErrorName(status) +
                             ": " + cudaGetErrorString(status));
}

// Makes `device` current for a scope. Touches nothing when it is already current, which is the rule under torch.
class DeviceGuard {
public:
    DeviceGuard(int device, const char* kernel) {
        check(cudaGetDevice(&previous_), kernel);
        if (previous_ == device) return;
        check(cudaSetDevice(device), kernel);
        restore_ = true;
    }
    ~DeviceGuard() {
        if (restore_) (void)cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int previous_ = 0;
    bool restore_ = false;
};

// One-dimensional launch: x alone takes 2^31 - 1 blocks (y and z only 65535). No blocks, no launch.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), const Queue& queue, int64_t blocks, int threads,
            Args... args) {
    if (blocks == 0) return;
    if (blocks > 0x7FFFFFFF) throw std::runtime_error(std::string(name) + ": more than 2^31 - 1 blocks");
    const DeviceGuard guard(queue.device, name);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = static_cast<cudaStream_t>(queue.stream);
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name);
    check(cudaGetLastError(), name);
}

// Zeroes in stream order.
inline void clear(const char* name, const Queue& queue, void* memory, size_t bytes) {
    const DeviceGuard guard(queue.device, name);
    check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(queue.stream)), name);
}

// Consecutive items, `per_block` to a block.
inline int64_t blocks_for(int64_t items, int64_t per_block) { return (items + per_block - 1) / per_block; }

}  // namespace bgpo::cuda
