// Enough of CUDA's C++ to run this project's kernels on a CPU, unchanged: `g++ -x c++ -I <this folder>` on csrc/cuda.
//
// A block is one fiber per thread, all on one OS thread. A fiber runs until a barrier or a warp exchange and then
// yields, so orders of the threads between two barriers can be tried: CUDA_EMULATOR_ORDER = forward (default),
// backward or shuffled. A result that changes with the order is a race. Stricter than a GPU: every lane must take
// part in a warp exchange, a barrier that not all running threads reach aborts, and under UBSan so does a misaligned
// vector access.
//
// CUDA_EMULATOR_RESIDENT = 5 keeps so many blocks of a launch going at once, a step of a random one at a time, each with
// its shared memory: what blocks tell one another through global memory is then seen at any stage, and a block that waits
// for another really waits. Default 1: one block after the other.
//
// Not modelled: speed, register and memory limits, memory ordering, the device's own exp, log and tanh.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static __attribute__((section("emulated_shared")))
#define __forceinline__ inline
#define __launch_bounds__(...)
#define CUDART_VERSION 0

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

// All shared variables of the kernels lie here, one after the other.
extern "C" char __start_emulated_shared[] __attribute__((visibility("hidden")));
extern "C" char __stop_emulated_shared[] __attribute__((visibility("hidden")));

namespace cuda_emulator {

constexpr int kWarp = 32;
constexpr long kMostSteps = 1000000;  // of a launch whose blocks run side by side
constexpr size_t kStack = 256 << 10;

enum class Wait { kNothing, kWarp, kBlock, kFinished };

struct Fiber {
    ucontext_t context;  // its beginning; later switches use _longjmp, which makes no system call
    jmp_buf resume;
    bool started = false;
    std::unique_ptr<char[]> stack{new char[kStack]};
    dim3 thread;
    Wait wait = Wait::kNothing;
};

[[noreturn]] inline void fail(const char* why) {
    std::fprintf(stderr, "cuda emulator: %s\n", why);
    std::abort();
}

class Block {
public:
    Block(unsigned threads, unsigned index) : index(index), fibers_(threads), slots_(threads), order_(threads) {
        std::iota(order_.begin(), order_.end(), 0);
        const char* order = std::getenv("CUDA_EMULATOR_ORDER");
        if (order && !std::strcmp(order, "backward")) std::reverse(order_.begin(), order_.end());
        shuffled_ = order && !std::strcmp(order, "shuffled");
    }

    void start(const std::function<void()>& body);
    bool step();  // every thread up to its next barrier; whether some thread still runs

    void wait(Wait what) {
        Fiber& self = fibers_[current_];
        self.wait = what;
        if (_setjmp(self.resume) == 0) _longjmp(scheduler_, 1);
    }

    // Hands `value` in for this lane; read(slots) then sees what every lane of the warp handed in.
    template <typename T, typename F>
    auto exchange(T value, F&& read) {
        static_assert(sizeof(T) <= sizeof(uint64_t), "one slot");
        std::memcpy(&slots_[current_], &value, sizeof(T));
        wait(Wait::kWarp);
        const auto result = read(&slots_[current_ / kWarp * kWarp]);
        wait(Wait::kWarp);
        return result;
    }

    const dim3& thread() const { return fibers_[current_].thread; }
    int lane() const { return static_cast<int>(current_ % kWarp); }
    const unsigned index;

private:
    static void enter();
    void resume(unsigned fiber);
    bool release(size_t begin, size_t end, Wait barrier);

    std::vector<Fiber> fibers_;
    std::vector<uint64_t> slots_;
    std::vector<unsigned> order_;
    std::mt19937 random_{20251013};
    bool shuffled_ = false;
    unsigned current_ = 0;
    jmp_buf scheduler_;
    const std::function<void()>* body_ = nullptr;
    std::vector<char> shared_;  // while another block runs
};

inline Block* block = nullptr;

inline void Block::enter() {
    (*block->body_)();
    block->wait(Wait::kFinished);
}

inline void Block::resume(unsigned i) {
    current_ = i;
    if (_setjmp(scheduler_) != 0) return;
    if (fibers_[i].started) _longjmp(fibers_[i].resume, 1);
    fibers_[i].started = true;
    setcontext(&fibers_[i].context);
}

// Lets the fibers go when all of them that still run wait at this barrier.
inline bool Block::release(size_t begin, size_t end, Wait barrier) {
    size_t waiting = 0, finished = 0;
    for (size_t i = begin; i < end; ++i) {
        waiting += fibers_[i].wait == barrier;
        finished += fibers_[i].wait == Wait::kFinished;
    }
    if (waiting == 0 || waiting + finished != end - begin) return false;
    if (barrier == Wait::kWarp && finished > 0) fail("a lane left before a warp exchange");
    for (size_t i = begin; i < end; ++i)
        if (fibers_[i].wait == barrier) fibers_[i].wait = Wait::kNothing;
    return true;
}

inline void Block::start(const std::function<void()>& body) {
    body_ = &body;
    shared_.assign(__start_emulated_shared, __stop_emulated_shared);
    for (unsigned i = 0; i < fibers_.size(); ++i) {
        Fiber& fiber = fibers_[i];
        fiber.thread = dim3(i, 0, 0);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, &Block::enter, 0);
    }
}

inline bool Block::step() {
    block = this;
    std::copy(shared_.begin(), shared_.end(), __start_emulated_shared);
    if (shuffled_) std::shuffle(order_.begin(), order_.end(), random_);
    for (unsigned i : order_)
        if (fibers_[i].wait == Wait::kNothing) resume(i);
    bool released = false, running = false;
    for (size_t w = 0; w < fibers_.size(); w += kWarp)
        released |= release(w, std::min(w + kWarp, fibers_.size()), Wait::kWarp);
    released |= release(0, fibers_.size(), Wait::kBlock);
    for (const Fiber& fiber : fibers_) running |= fiber.wait != Wait::kFinished;
    if (running && !released) fail("threads wait at different barriers");
    shared_.assign(__start_emulated_shared, __stop_emulated_shared);
    block = nullptr;
    return running;
}

// Blocks 0, 1, ... of a grid, so many at once as the environment says.
inline void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& body) {
    const char* resident = std::getenv("CUDA_EMULATOR_RESIDENT");
    const size_t most = resident ? std::strtoul(resident, nullptr, 10) : 1;
    std::mt19937 random{blocks};
    std::vector<std::unique_ptr<Block>> running;
    unsigned next = 0;
    for (long steps = 0; next < blocks || !running.empty(); ++steps) {
        while (next < blocks && running.size() < most) {
            running.push_back(std::make_unique<Block>(threads, next++));
            running.back()->start(body);
        }
        // Rather a later block, so that it overtakes those that it waits for.
        const size_t chosen = std::max({random() % running.size(), random() % running.size(), random() % running.size()});
        if (!running[chosen]->step()) running.erase(running.begin() + static_cast<long>(chosen));
        if (most > 1 && steps > kMostSteps) fail("blocks wait for one another for ever");
    }
}

struct Index {
    unsigned x;
};

}  // namespace cuda_emulator

#define threadIdx (cuda_emulator::block->thread())
#define blockIdx (cuda_emulator::Index{cuda_emulator::block->index})

inline void __syncthreads() { cuda_emulator::block->wait(cuda_emulator::Wait::kBlock); }

inline void require_full_mask(unsigned mask) {
    if (mask != 0xFFFFFFFFu) cuda_emulator::fail("only full warp masks are emulated");
}

// `value` of another lane; one's own where there is no such lane.
template <typename T>
T value_of_lane(T value, int lane) {
    return cuda_emulator::block->exchange(value, [&](const uint64_t* slots) {
        T result = value;
        if (lane >= 0 && lane < cuda_emulator::kWarp) std::memcpy(&result, &slots[lane], sizeof(T));
        return result;
    });
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int step) {
    require_full_mask(mask);
    return value_of_lane(value, cuda_emulator::block->lane() + step);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int step) {
    require_full_mask(mask);
    return value_of_lane(value, cuda_emulator::block->lane() - step);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    require_full_mask(mask);
    return cuda_emulator::block->exchange(uint64_t{predicate != 0}, [](const uint64_t* slots) {
        unsigned ballot = 0;
        for (int lane = 0; lane < cuda_emulator::kWarp; ++lane) ballot |= static_cast<unsigned>(slots[lane]) << lane;
        return ballot;
    });
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <typename T>
T atomicAdd(T* address, T value) {
    const T old = *address;
    *address += value;
    return old;
}

// The runtime: one device, one stream, never an error.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "none"; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t) {
    return std::memset(memory, byte, bytes), cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
    cuda_emulator::run_grid(config->gridDim.x, config->blockDim.x, [&] { kernel(args...); });
    return cudaSuccess;
}
