// Random masking: noisy ids, counts and weights per segment (sequence b, sample j), then the list of masked rows.
//
// select     One CTA per segment. The l smallest keys are found by radix selection (select.h): two or three passes
//            over the L keys, recomputed with Philox each time instead of stored (~70 integer instructions against 8
//            bytes), counted in a shared histogram; integer counts are the same in any order. One more pass writes
//            the noisy ids. Bytes per segment: 8T written, 13T read (14T with a prompt mask), mostly from L2 as n
//            segments share them.
// emit_rows  One CTA per segment: counts per warp, then ascending writes. At most 9T bytes read, twice, the second time
//            from cache; 16 bytes written and 8 read per row.
//
// Integers throughout; the fp32 weight is divided in fp64. All bits follow from draw.h and stream.h, none from the
// grid.
#include "../bgpo/draw.h"
#include "../bgpo/select.h"
#include "launch.cuh"

namespace bgpo::cuda {
namespace {

constexpr int kThreads = kRadixSize;  // one thread per digit when a histogram is scanned
constexpr int kWarps = kThreads / kWarp;

// Which positions of a response a segment masks: those selected by the threshold, or all the others.
struct Rule {
    SelectionThreshold threshold;
    bool complement;
};

constexpr SelectionThreshold kEverything{~uint64_t{0}, kAllTies};

// Keys of a segment, by position in the response.
struct Keys {
    uint32_t j;
    int64_t sample_id;
    uint64_t seed;

    __device__ uint64_t operator()(int64_t position) const {
        return selection_key(stream_words(static_cast<uint32_t>(position), j, sample_id, kSelectionKeys, seed));
    }
};

struct Digit {
    uint32_t digit, below, size;
};

// The digit whose bucket holds the `wanted`-th key (from 1) of a histogram with one counter per thread.
__device__ Digit find_digit(uint32_t size, uint32_t wanted) {
    __shared__ uint32_t of_warp[kWarps];
    __shared__ Digit found;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    uint32_t up_to = size;  // inclusive scan
    for (int step = 1; step < kWarp; step *= 2) {
        const uint32_t left = __shfl_up_sync(kAllLanes, up_to, step);
        if (lane >= step) up_to += left;
    }
    if (lane == kWarp - 1) of_warp[warp] = up_to;
    __syncthreads();
    for (int w = 0; w < warp; ++w) up_to += of_warp[w];
    const uint32_t below = up_to - size;
    if (below < wanted && wanted <= up_to) found = {threadIdx.x, below, size};
    __syncthreads();
    return found;
}

// Threshold of the `count` smallest keys of a response, 1 <= count < length. Every thread returns the same.
__device__ SelectionThreshold select_smallest(const Keys& keys, int64_t length, int64_t count) {
    __shared__ uint32_t histogram[kRadixSize];
    RadixState state;
    state.remaining = static_cast<uint32_t>(count);
    while (!state.done) {
        histogram[threadIdx.x] = 0;
        __syncthreads();
        for (int64_t p = threadIdx.x; p < length; p += kThreads) {
            const uint64_t key = keys(p);
            if (radix_matches(state, key)) atomicAdd(&histogram[radix_digit(state, key)], 1u);
        }
        __syncthreads();
        const Digit d = find_digit(histogram[threadIdx.x], state.remaining);
        radix_fix(state, d.digit, d.below, d.size);
    }
    return radix_threshold(state);
}

__device__ bool is_selected(const SelectionThreshold& t, const Keys& keys, int64_t position) {
    const uint64_t key = keys(position);
    if (key != t.key) return key < t.key;
    if (t.ties == kAllTies) return true;
    // All 64 bits were needed (about 1e-8 at L = 32768): the one or two threads that hold this key count those before.
    uint32_t before = 0;
    for (int64_t p = 0; p < position; ++p) before += keys(p) == key;
    return before < t.ties;
}

// The segment's rule and weight; `keys` takes the sample whose keys decide.
__device__ Rule draw_rule(const DrawArgs& a, int64_t b, uint32_t j, int64_t length, Keys& keys, float& weight) {
    const int64_t at = a.schedule == kTable ? a.table_start[b] : 0;
    const CountLaw law{a.scheme, a.schedule, a.n, a.thresholds + at, a.table_weights + at};
    if (a.scheme == kBernoulli) {
        const BernoulliDraw draw = draw_bernoulli(law, j, keys.sample_id, a.seed);
        weight = draw.weight;  // word 0 below q = key below q << 32; q = 2^32 wraps to all keys
        return {{(static_cast<uint64_t>(draw.threshold) << 32) - 1, kAllTies}, false};
    }
    const Count c = draw_count(law, j, keys.sample_id, a.seed, length);
    weight = c.weight;
    if (c.masked == 0 || c.masked == length) return {kEverything, c.masked == 0};
    keys.j = key_sample(c, j);
    return {select_smallest(keys, length, c.drawn), c.complement};
}

__device__ int block_sum(int value) {
    __shared__ int of_warp[kWarps];
    for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_down_sync(kAllLanes, value, step);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
    __syncthreads();
    int sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += of_warp[w];
    return sum;
}

__global__ void __launch_bounds__(kThreads) select_kernel(DrawArgs a, int64_t* noisy, int32_t* count, float* weight) {
    const int64_t s = blockIdx.x, samples = a.hi - a.lo, b = s / samples, row = b * a.tokens;
    const uint32_t j = static_cast<uint32_t>(a.lo + s % samples);
    const int64_t length = a.response_counts[row + a.tokens - 1];
    Keys keys{j, a.sample_ids[b], a.seed};
    float segment_weight;
    const Rule rule = draw_rule(a, b, j, length, keys, segment_weight);
    const bool trivial = rule.threshold.key == kEverything.key && rule.threshold.ties == kAllTies;
    const bool prompts = a.prompt_mask && a.prompt_threshold > 0;

    int masked = 0;
    for (int64_t t = threadIdx.x; t < a.tokens; t += kThreads) {
        int64_t id = a.input_ids[row + t];
        if (a.response_mask[row + t]) {
            const int64_t position = a.response_counts[row + t] - 1;
            if ((trivial || is_selected(rule.threshold, keys, position)) != rule.complement) {
                id = a.mask_token_id;
                ++masked;
            }
        }
        if (prompts && a.prompt_mask[row + t]) {
            const Words w = stream_words(static_cast<uint32_t>(t), j, keys.sample_id, kPromptTokens, a.seed);
            if (static_cast<int64_t>(w.x) < a.prompt_threshold) id = a.mask_token_id;
        }
        noisy[s * a.tokens + t] = id;
    }
    masked = block_sum(masked);
    if (threadIdx.x == 0) {
        count[s] = masked;
        weight[s] = segment_weight;
    }
}

__global__ void __launch_bounds__(kThreads) emit_rows_kernel(EmitArgs a, int64_t* rows, int64_t* targets) {
    __shared__ int of_warp[kWarps];
    const int64_t s = blockIdx.x, b = s / a.samples;
    const int64_t* noisy = a.noisy_ids + s * a.tokens;
    const int64_t* input = a.input_ids + b * a.tokens;
    const uint8_t* response = a.response_mask + b * a.tokens;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    // Each warp owns a contiguous share, so one exchange of counts places them all.
    const int64_t share = (a.tokens + kThreads - 1) / kThreads * kWarp;
    const int64_t begin = warp * share, end = begin + share < a.tokens ? begin + share : a.tokens;
    const auto lanes_masked = [&](int64_t t) {
        return __ballot_sync(kAllLanes, t < end && response[t] && noisy[t] == a.mask_token_id);
    };

    int mine = 0;
    for (int64_t base = begin; base < end; base += kWarp) mine += __popc(lanes_masked(base + lane));
    if (lane == 0) of_warp[warp] = mine;
    __syncthreads();
    int64_t at = a.offsets[s];
    for (int w = 0; w < warp; ++w) at += of_warp[w];
    for (int64_t base = begin; base < end; base += kWarp) {
        const int64_t t = base + lane;
        const unsigned masked = lanes_masked(t), before = masked & ((1u << lane) - 1);
        if (masked >> lane & 1u) {
            rows[at + __popc(before)] = s * a.tokens + t;
            targets[at + __popc(before)] = input[t];
        }
        at += __popc(masked);
    }
}

}  // namespace

void select(const Queue& queue, const DrawArgs& a, int64_t* noisy, int32_t* count, float* weight) {
    if (a.tokens == 0) return;
    launch("select", select_kernel, queue, a.batch * (a.hi - a.lo), kThreads, a, noisy, count, weight);
}

void emit_rows(const Queue& queue, const EmitArgs& a, int64_t* rows, int64_t* targets) {
    launch("emit_rows", emit_rows_kernel, queue, a.batch * a.samples, kThreads, a, rows, targets);
}

}  // namespace bgpo::cuda
