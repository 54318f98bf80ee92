// Random masking: counts, weights, offsets, noisy ids, rows and targets of all segments (sequence b, sample j) in one
// launch.
//
// One CTA per segment, each warp owning a contiguous share of the row.
//
//   count    the law of draw.h: one Philox call; Bernoulli: one pass over the keys.
//   place    where the segment's rows go is the sum of all counts before it: a single-pass scan (Merrill and Garland
//            2016). A CTA publishes its count at once; later, one warp adds up the counts of its predecessors, 32 at a
//            time, back to one that has published the sum up to itself. CTAs number themselves by a ticket, so whoever
//            waits waits only for CTAs that run already and that publish before they wait for anyone.
//   select   the l smallest keys by radix selection (select.h): two or three passes over the L keys, recomputed with
//            Philox each time instead of stored (~70 integer instructions against 8 bytes), counted in a shared
//            histogram; integer counts are the same in any order. Between publishing and looking back, so that the
//            look-back finds its predecessors done.
//   write    one pass writes the noisy ids and counts the masked ones of every warp; after one exchange of these the
//            last pass packs rows and targets in ascending order.
//
// Bytes per segment: 8T + 24 + 16 a masked row written; 10T read (11T with a prompt mask) mostly from L2, as n segments
// share them; the 9T of the last pass from L1. 8 bytes a segment of scan state, cleared before the launch.
//
// Integers throughout; the fp32 weight is divided in fp64. All bits follow from draw.h and stream.h, none from the
// grid or from the order in which CTAs run.
#include "../bgpo/draw.h"
#include "../bgpo/select.h"
#include "launch.cuh"

namespace bgpo::cuda {
namespace {

constexpr int kThreads = kRadixSize;  // one thread per digit when a histogram is scanned
constexpr int kWarps = kThreads / kWarp;
constexpr int kResident = 4;  // CTAs a multiprocessor: 64 registers a thread

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

// Which tokens a segment masks: by position, the (key, position) up to a threshold, or all but those; or all; or none.
struct Selected {
    SelectionThreshold threshold;
    bool others, everything, nothing;
};

// What thread 0 draws for all.
struct Drawn {
    int64_t masked;
    uint32_t last;  // Bernoulli: masked where word 0 of the key is at most this
    float weight;
};

__device__ Drawn draw_segment(const DrawArgs& a, int64_t b, uint32_t j, int64_t length) {
    __shared__ Drawn drawn;
    const int64_t id = a.sample_ids[b];
    if (threadIdx.x == 0) {
        const int64_t at = a.schedule == kTable ? a.table_start[b] : 0;
        const CountLaw law{a.scheme, a.schedule, a.n, a.thresholds + at, a.table_weights + at};
        if (a.scheme == kBernoulli) {
            const BernoulliDraw draw = draw_bernoulli(law, j, id, a.seed);
            drawn = {0, draw.last, draw.weight};
        } else {
            const Count count = draw_count(law, j, id, a.seed, length);
            drawn = {count.masked, 0, count.weight};
        }
    }
    __syncthreads();
    Drawn mine = drawn;
    if (a.scheme == kBernoulli) {
        const Keys keys{j, id, a.seed};
        int masked = 0;
        for (int64_t p = threadIdx.x; p < length; p += kThreads) masked += static_cast<uint32_t>(keys(p) >> 32) <= mine.last;
        mine.masked = block_sum(masked);
    }
    return mine;
}

__device__ Selected select_segment(const DrawArgs& a, const Drawn& drawn, const Selection& s, const Keys& keys,
                                   int64_t length) {
    Selected result{{0, 0}, s.others, drawn.masked == length, drawn.masked == 0};
    if (result.everything || result.nothing) return result;
    if (a.scheme == kBernoulli) result.threshold = {selection_key({drawn.last, 0xFFFFFFFFu, 0, 0}), kAllTies};
    else result.threshold = select_smallest(keys, length, s.smallest);
    return result;
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

__device__ bool is_masked(const Selected& s, const Keys& keys, int64_t position) {
    return s.everything || (!s.nothing && is_selected(s.threshold, keys, position) != s.others);
}

// The scan's state, one word a segment behind the ticket: what is known of it, and the number. A word is written and read
// whole, so no fence is needed.
enum Known : uint64_t { kUnknown = 0, kCount = 1, kSumUpToHere = 2 };

__device__ void publish(uint64_t* state, int64_t s, int64_t number, Known known) {
    *const_cast<volatile uint64_t*>(state + 1 + s) = static_cast<uint64_t>(number) << 2 | known;
}

__device__ int64_t take_ticket(uint64_t* state) {
    __shared__ int64_t mine;
    auto& ticket = *reinterpret_cast<unsigned long long*>(state);
    if (threadIdx.x == 0) mine = static_cast<int64_t>(atomicAdd(&ticket, 1ull));
    __syncthreads();
    return mine;
}

// Sum of the counts of all segments before s. Lane i of warp 0 looks at segment s - 1 - i; then 32 further back.
__device__ int64_t look_back(uint64_t* state, int64_t s) {
    __shared__ int64_t found;
    if (warp_id() == 0) {
        int64_t before = 0;
        bool done = false;
        for (int64_t last = s - 1; !done; last -= kWarp) {
            const int64_t i = last - lane_id();
            uint64_t word = kSumUpToHere;  // before the first segment: 0
            unsigned waiting;
            do {
                if (i >= 0) word = *const_cast<volatile uint64_t*>(state + 1 + i);
                waiting = __ballot_sync(kAllLanes, (word & 3) == kUnknown);
            } while (waiting);
            const unsigned sums = __ballot_sync(kAllLanes, (word & 3) == kSumUpToHere);
            done = sums != 0;
            const unsigned needed = done ? sums ^ (sums - 1) : kAllLanes;  // up to the nearest sum
            int64_t part = needed >> lane_id() & 1u ? static_cast<int64_t>(word >> 2) : 0;
            for (int step = kWarp / 2; step > 0; step /= 2) part += __shfl_down_sync(kAllLanes, part, step);
            before += part;  // of lane 0
        }
        if (lane_id() == 0) found = before;
    }
    __syncthreads();
    return found;
}

// Whether lane by lane the tokens at t are response tokens, as bits; lanes beyond the share are not.
__device__ unsigned response_lanes(const uint8_t* response, int64_t t, int64_t end) {
    return __ballot_sync(kAllLanes, t < end && response[t]);
}

__device__ unsigned lanes_before() { return (1u << lane_id()) - 1; }

__global__ void __launch_bounds__(kThreads, kResident) draw_kernel(DrawArgs a, DrawResult out, uint64_t* state) {
    const int64_t s = take_ticket(state), samples = a.hi - a.lo, b = s / samples;
    const uint32_t j = static_cast<uint32_t>(a.lo + s % samples);
    const int64_t* clean = a.input_ids + b * a.tokens;
    const uint8_t* response = a.response_mask + b * a.tokens;
    const uint8_t* prompt = a.prompt_mask && a.prompt_threshold > 0 ? a.prompt_mask + b * a.tokens : nullptr;
    int64_t* row = out.noisy + s * a.tokens;
    const Share share = share_of_row(a.tokens);

    int mine = 0;
    for (int64_t base = share.begin; base < share.end; base += kWarp)
        mine += __popc(response_lanes(response, base + lane_id(), share.end));
    const Scan lengths = scan_warps(mine);
    const Drawn drawn = draw_segment(a, b, j, lengths.total);
    if (threadIdx.x == 0) publish(state, s, drawn.masked, kCount);

    const Selection selection = selection_of(a.scheme == kCoupled, j, drawn.masked, lengths.total);
    const Keys keys{selection.keys_of, a.sample_ids[b], a.seed};
    const Selected selected = select_segment(a, drawn, selection, keys, lengths.total);
    const int64_t place = look_back(state, s);
    if (threadIdx.x == 0) {
        publish(state, s, place + drawn.masked, kSumUpToHere);
        if (s == 0) out.offsets[0] = 0;
        out.offsets[s + 1] = place + drawn.masked;
        out.count[s] = static_cast<int32_t>(drawn.masked);
        out.weight[s] = drawn.weight;
    }

    int64_t position = lengths.before;
    mine = 0;
    for (int64_t base = share.begin; base < share.end; base += kWarp) {
        const int64_t t = base + lane_id();
        const unsigned scored = response_lanes(response, t, share.end);
        bool hide = false;
        if (scored >> lane_id() & 1u) hide = is_masked(selected, keys, position + __popc(scored & lanes_before()));
        position += __popc(scored);
        mine += __popc(__ballot_sync(kAllLanes, hide));
        if (t >= share.end) continue;
        if (prompt && prompt[t]) {
            const Words w = stream_words(static_cast<uint32_t>(t), j, keys.sample_id, kPromptTokens, a.seed);
            hide = hide || static_cast<int64_t>(w.x) < a.prompt_threshold;
        }
        row[t] = hide ? a.mask_token_id : clean[t];
    }

    int64_t at = place + scan_warps(mine).before;
    for (int64_t base = share.begin; base < share.end; base += kWarp) {
        const int64_t t = base + lane_id();
        const unsigned hidden = __ballot_sync(kAllLanes, t < share.end && response[t] && row[t] == a.mask_token_id);
        if (hidden >> lane_id() & 1u) {
            out.rows[at + __popc(hidden & lanes_before())] = s * a.tokens + t;
            out.targets[at + __popc(hidden & lanes_before())] = clean[t];
        }
        at += __popc(hidden);
    }
}

}  // namespace

void draw_masks(const Queue& queue, const DrawArgs& a, const DrawResult& out, uint64_t* state) {
    const int64_t segments = a.batch * (a.hi - a.lo);
    clear("draw_masks", queue, state, (segments + 1) * sizeof(uint64_t));
    launch("draw_masks", draw_kernel, queue, segments, kThreads, a, out, state);
}

}  // namespace bgpo::cuda
