// Random masking: counts and weights per segment (sequence b, sample j), then, with every segment's place known, noisy
// ids, rows and targets in one launch.
//
// draw_counts  One CTA per segment. T bytes read, from cache but for the first of a sequence's n samples; 8 written.
// draw_masks   One CTA per segment, each warp owning a contiguous share of the row. The l smallest keys are found by
//              radix selection (select.h): two or three passes over the L keys, recomputed with Philox each time instead
//              of stored (~70 integer instructions against 8 bytes), counted in a shared histogram; integer counts are
//              the same in any order. One more pass writes the noisy ids and counts the masked ones of every warp; after
//              one exchange of these the last pass packs rows and targets in ascending order. Bytes per segment: 8T + 16
//              a masked row written; 10T read (11T with a prompt mask) mostly from L2, as n segments share them; the 9T
//              of the last pass from L1.
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

__device__ int lane_id() { return threadIdx.x % kWarp; }
__device__ int warp_id() { return threadIdx.x / kWarp; }

struct Scan {
    int before, total;  // of the warps before this one; of all
};

// One number per warp, in warp order. Every thread gets its warp's result.
__device__ Scan scan_warps(int mine) {
    __shared__ int of_warp[kWarps];
    __syncthreads();  // an earlier scan may still be read
    if (lane_id() == 0) of_warp[warp_id()] = mine;
    __syncthreads();
    Scan s{0, 0};
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp_id()) s.before += of_warp[w];
        s.total += of_warp[w];
    }
    return s;
}

__device__ int block_sum(int value) {
    for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_down_sync(kAllLanes, value, step);
    return scan_warps(value).total;
}

// A warp's contiguous share of a row: [begin, end), walked a lane each.
struct Share {
    int64_t begin, end;
};

__device__ Share share_of_row(int64_t tokens) {
    const int64_t size = (tokens + kThreads - 1) / kThreads * kWarp, begin = warp_id() * size;
    return {begin, begin + size < tokens ? begin + size : tokens};
}

__global__ void __launch_bounds__(kThreads) counts_kernel(CountArgs a, int32_t* count, float* weight) {
    const int64_t s = blockIdx.x, samples = a.hi - a.lo, b = s / samples, id = a.sample_ids[b];
    const uint32_t j = static_cast<uint32_t>(a.lo + s % samples);
    int response = 0;
    for (int64_t t = threadIdx.x; t < a.tokens; t += kThreads) response += a.response_mask[b * a.tokens + t];
    const int64_t length = block_sum(response), at = a.schedule == kTable ? a.table_start[b] : 0;
    const CountLaw law{a.scheme, a.schedule, a.n, a.thresholds + at, a.table_weights + at};
    if (a.scheme == kBernoulli) {
        const BernoulliDraw draw = draw_bernoulli(law, j, id, a.seed);
        int masked = 0;
        for (int64_t p = threadIdx.x; p < length; p += kThreads)
            masked += stream_words(static_cast<uint32_t>(p), j, id, kSelectionKeys, a.seed).x <= draw.last;
        masked = block_sum(masked);
        if (threadIdx.x == 0) {
            count[s] = masked;
            weight[s] = draw.weight;
        }
    } else if (threadIdx.x == 0) {
        const Count c = draw_count(law, j, id, a.seed, length);
        count[s] = static_cast<int32_t>(c.masked);
        weight[s] = c.weight;
    }
}

// Whether lane by lane the tokens at t are response tokens, as bits; lanes beyond the share are not.
__device__ unsigned response_lanes(const uint8_t* response, int64_t t, int64_t end) {
    return __ballot_sync(kAllLanes, t < end && response[t]);
}

__device__ unsigned lanes_before() { return (1u << lane_id()) - 1; }

__global__ void __launch_bounds__(kThreads) masks_kernel(DrawArgs a, int64_t* noisy, int64_t* rows, int64_t* targets) {
    const int64_t s = blockIdx.x, samples = a.hi - a.lo, b = s / samples;
    const uint32_t j = static_cast<uint32_t>(a.lo + s % samples);
    const int64_t* clean = a.input_ids + b * a.tokens;
    const uint8_t* response = a.response_mask + b * a.tokens;
    const uint8_t* prompt = a.prompt_mask && a.prompt_threshold > 0 ? a.prompt_mask + b * a.tokens : nullptr;
    int64_t* row = noisy + s * a.tokens;
    const Share share = share_of_row(a.tokens);

    int mine = 0;
    for (int64_t base = share.begin; base < share.end; base += kWarp)
        mine += __popc(response_lanes(response, base + lane_id(), share.end));
    const Scan lengths = scan_warps(mine);
    const int64_t length = lengths.total, masked = a.offsets[s + 1] - a.offsets[s];
    const Selection selection = selection_of(a.coupled, j, masked, length);
    const Keys keys{selection.keys_of, a.sample_ids[b], a.seed};
    const bool everything = masked == length, nothing = masked == 0;
    SelectionThreshold threshold{0, 0};
    if (!everything && !nothing) threshold = select_smallest(keys, length, selection.smallest);

    int64_t position = lengths.before;
    mine = 0;
    for (int64_t base = share.begin; base < share.end; base += kWarp) {
        const int64_t t = base + lane_id();
        const unsigned scored = response_lanes(response, t, share.end);
        bool hide = false;
        if (scored >> lane_id() & 1u) {
            const int64_t p = position + __popc(scored & lanes_before());
            hide = everything || (!nothing && is_selected(threshold, keys, p) != selection.others);
        }
        position += __popc(scored);
        mine += __popc(__ballot_sync(kAllLanes, hide));
        if (t >= share.end) continue;
        if (prompt && prompt[t]) {
            const Words w = stream_words(static_cast<uint32_t>(t), j, keys.sample_id, kPromptTokens, a.seed);
            hide = hide || static_cast<int64_t>(w.x) < a.prompt_threshold;
        }
        row[t] = hide ? a.mask_token_id : clean[t];
    }

    int64_t at = a.offsets[s] + scan_warps(mine).before;
    for (int64_t base = share.begin; base < share.end; base += kWarp) {
        const int64_t t = base + lane_id();
        const unsigned hidden = __ballot_sync(kAllLanes, t < share.end && response[t] && row[t] == a.mask_token_id);
        if (hidden >> lane_id() & 1u) {
            rows[at + __popc(hidden & lanes_before())] = s * a.tokens + t;
            targets[at + __popc(hidden & lanes_before())] = clean[t];
        }
        at += __popc(hidden);
    }
}

}  // namespace

void draw_counts(const Queue& queue, const CountArgs& a, int32_t* count, float* weight) {
    launch("draw_counts", counts_kernel, queue, a.batch * (a.hi - a.lo), kThreads, a, count, weight);
}

void draw_masks(const Queue& queue, const DrawArgs& a, int64_t* noisy, int64_t* rows, int64_t* targets) {
    if (a.tokens == 0) return;
    launch("draw_masks", masks_kernel, queue, a.batch * (a.hi - a.lo), kThreads, a, noisy, rows, targets);
}

}  // namespace bgpo::cuda
