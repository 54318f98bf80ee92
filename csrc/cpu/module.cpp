// bgpo_kernels._cpu: raw addresses and sizes in, nothing of torch. Callers (native.py) check dtypes, shapes and strides.
#include <pybind11/pybind11.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "../bgpo/philox.h"
#include "engine.h"

namespace py = pybind11;
using namespace bgpo;
using namespace bgpo::cpu;

namespace {

const Kernels* choose_kernels() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
        return &kernels_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        return &kernels_avx2;
#endif
    return &kernels_baseline;
}

const Kernels* active = choose_kernels();

// Lets tests run every instruction set that this machine has.
void use_kernels(const std::string& name) {
    if (name == kernels_baseline.name) { active = &kernels_baseline; return; }
#if defined(__x86_64__)
    const Kernels* best = choose_kernels();
    if (name == kernels_avx2.name && best != &kernels_baseline) { active = &kernels_avx2; return; }
    if (name == kernels_avx512.name && best == &kernels_avx512) { active = &kernels_avx512; return; }
#endif
    throw py::value_error("this machine cannot run " + name);
}

// DrawArgs plus where the responses lie.
struct Draw {
    std::vector<Response> responses;
    std::vector<std::vector<int64_t>> scattered;  // indices of responses that are not one run
    DrawArgs args;

    Draw(uintptr_t ids, uintptr_t response, uintptr_t prompt, uintptr_t sample_ids, uintptr_t offsets, int64_t batch,
         int64_t tokens, int64_t lo, int64_t hi, uint64_t seed, int64_t mask_token_id, bool coupled,
         int64_t prompt_threshold) {
        for (int64_t b = 0; b < batch; ++b) locate(pointer<const uint8_t>(response) + b * tokens, tokens);
        args = {pointer<const int64_t>(ids), responses.data(), pointer<const uint8_t>(prompt),
                pointer<const int64_t>(sample_ids), pointer<const int64_t>(offsets), batch, tokens, lo, hi, seed,
                mask_token_id, coupled, prompt_threshold};
    }
    Draw(const Draw&) = delete;
    Draw& operator=(const Draw&) = delete;

   private:
    void locate(const uint8_t* mask, int64_t tokens) {
        const auto* begin = static_cast<const uint8_t*>(std::memchr(mask, 1, tokens));
        const int64_t first = begin ? begin - mask : tokens;
        const auto* zero = static_cast<const uint8_t*>(std::memchr(mask + first, 0, tokens - first));
        const int64_t end = zero ? zero - mask : tokens;
        if (std::memchr(mask + end, 1, tokens - end) == nullptr) {
            responses.push_back({end - first, first, nullptr});
            return;
        }
        std::vector<int64_t> index;
        for (int64_t t = first; t < tokens; ++t)
            if (mask[t]) index.push_back(t);
        scattered.push_back(std::move(index));  // moving a vector keeps its buffer, so the pointer below stays good
        responses.push_back({static_cast<int64_t>(scattered.back().size()), first, scattered.back().data()});
    }
};

// Asks for 2 MiB pages under a fresh buffer. First touches of 4 KiB pages are dear (on a virtual machine some 2 us each,
// 30 ms for a 64 MiB gradient). A hint: where the kernel has none to give, nothing changes.
void advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 4096;
    const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
    if (begin < end) madvise(pointer<void>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// (lengths, sample ids, lowest id, highest id, largest id of a response, mask token held, prompt and response overlap)
py::tuple call_input_facts(uintptr_t ids, uintptr_t response, uintptr_t prompt, uintptr_t sample_ids, int64_t batch,
                           int64_t tokens, int64_t mask_token_id) {
    std::vector<int64_t> lengths(batch);
    Facts f;
    {
        const py::gil_scoped_release release;
        f = active->input_facts(pointer<const int64_t>(ids), pointer<const uint8_t>(response),
                                pointer<const uint8_t>(prompt), batch, tokens, mask_token_id, lengths.data());
    }
    py::list found(batch), samples(batch);
    for (int64_t b = 0; b < batch; ++b) {
        found[b] = lengths[b];
        samples[b] = sample_ids ? pointer<const int64_t>(sample_ids)[b] : b;
    }
    return py::make_tuple(found, samples, f.lowest, f.highest, f.largest_response, f.held, f.overlap);
}

py::tuple philox_words(uint32_t x, uint32_t y, uint32_t z, uint32_t w, uint64_t seed) {
    const Words r = philox({x, y, z, w}, seed);
    return py::make_tuple(r.x, r.y, r.z, r.w);
}

CountArgs make_counts(uintptr_t lengths, uintptr_t sample_ids, int64_t batch, int64_t n, int64_t lo, int64_t hi,
                      uint64_t seed, int scheme, int schedule, uintptr_t thresholds, uintptr_t table_weights,
                      uintptr_t table_start) {
    return {pointer<const int64_t>(lengths), pointer<const int64_t>(sample_ids), batch, n, lo, hi, seed, scheme,
            schedule, pointer<const int64_t>(thresholds), pointer<const float>(table_weights),
            pointer<const int64_t>(table_start)};
}

template <typename T>
void call_segment_sum(uintptr_t values, uintptr_t offsets, uintptr_t weight, int64_t segments, uintptr_t out) {
    segment_sum(pointer<const T>(values), pointer<const int64_t>(offsets), pointer<const float>(weight), segments,
                pointer<T>(out));
}

template <typename T>
void call_bound(uintptr_t logprob, uintptr_t advantages, uintptr_t old, uintptr_t length, int64_t batch, int64_t n,
                double clip_low, double clip_high, double dual_clip, uintptr_t term, uintptr_t slope) {
    bound(pointer<const T>(logprob), pointer<const T>(advantages), pointer<const T>(old),
          pointer<const float>(length), batch, n, Clip{clip_low, clip_high, dual_clip}, pointer<T>(term),
          pointer<T>(slope));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    using release = py::call_guard<py::gil_scoped_release>;
    m.doc() = "Compiled CPU engine of bgpo_kernels";
    m.attr("LOGIT_FLOAT") = static_cast<int>(LogitType::kFloat);
    m.attr("LOGIT_BFLOAT16") = static_cast<int>(LogitType::kBFloat16);
    m.attr("LOGIT_DOUBLE") = static_cast<int>(LogitType::kDouble);

    py::class_<Chunk>(m, "Chunk", py::module_local()).def(py::init(&make_chunk));
    py::class_<CountArgs>(m, "Counts", py::module_local()).def(py::init(&make_counts));
    py::class_<Draw>(m, "Draw", py::module_local())
        .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t,
                      uint64_t, int64_t, bool, int64_t>());

    m.def("isa", [] { return std::string(active->name); });
    m.def("use_kernels", &use_kernels);
    m.def("philox", &philox_words);
    m.def("advise_huge_pages", &advise_huge_pages);
    m.def("row_statistics", [](const Chunk& c, bool entropy, int threads) {
        active->row_statistics(c, entropy, threads); }, release());
    m.def("dlogits", [](const Chunk& c, uintptr_t grad_logprob, uintptr_t grad_entropy, int threads) {
        active->dlogits(c, pointer<const void>(grad_logprob), pointer<const void>(grad_entropy), threads);
    }, release());
    m.def("input_facts", &call_input_facts);
    m.def("draw_counts", [](const CountArgs& a, uintptr_t count, uintptr_t weight, uintptr_t offsets, int threads) {
        active->draw_counts(a, pointer<int32_t>(count), pointer<float>(weight), pointer<int64_t>(offsets), threads);
    }, release());
    m.def("draw_masks", [](const Draw& d, uintptr_t noisy, uintptr_t rows, uintptr_t targets, int threads) {
        active->draw_masks(d.args, pointer<int64_t>(noisy), pointer<int64_t>(rows), pointer<int64_t>(targets), threads);
    }, release());
    m.def("segment_sum_f32", &call_segment_sum<float>, release());
    m.def("segment_sum_f64", &call_segment_sum<double>, release());
    m.def("bound_f32", &call_bound<float>, release());
    m.def("bound_f64", &call_bound<double>, release());
}
