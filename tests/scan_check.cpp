// The look-back of the mask kernel's scan, on the CUDA emulator: whatever is known of the segments before, their sum.
#include "../csrc/cuda/mask.cu"
#include "check.h"

#include <vector>

namespace bgpo::cuda {
namespace {

void look_back_kernel(uint64_t* state, int64_t s, int64_t* before) {
    const int64_t found = look_back(state, s);
    if (found != look_back(state, s)) cuda_emulator::fail("two answers");
    before[threadIdx.x] = found;
}

// Segment i counts i + 3; those at multiples of `every` (0: none) have published their sum, and a wrong count would show.
void check_every(int64_t every) {
    for (const int64_t s : {0, 1, 2, 31, 32, 33, 63, 64, 65, 66, 96, 97, 200}) {
        std::vector<uint64_t> state(s + 2, 0xFFFFFFFFFFFFFFFF);  // beyond s: never to be read
        int64_t sum = 0;
        for (int64_t i = 0; i < s; ++i) {
            sum += i + 3;
            if (every && i % every == 0) publish(state.data(), i, sum, kSumUpToHere);
            else publish(state.data(), i, i + 3, kCount);
        }
        std::vector<int64_t> before(kThreads, -1);
        launch("look_back", look_back_kernel, Queue{0, nullptr}, 1, kThreads, state.data(), s, before.data());
        for (const int64_t found : before) CHECK(found == sum);
    }
}

}  // namespace
}  // namespace bgpo::cuda

int main() {
    for (const int64_t every : {0, 1, 2, 7, 31, 32, 33, 64, 70}) bgpo::cuda::check_every(every);
    return failures != 0;
}
