// What this build and this machine are; asked by `python -m bgpo_kernels.info`, never on a hot path.
#include "launch.cuh"

namespace bgpo::cuda {

int device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
    (void)cudaGetLastError();
    return 0;
}

int toolkit_version() { return CUDART_VERSION; }

}  // namespace bgpo::cuda
