// bgpo_kernels._cuda: raw device addresses, sizes and a stream handle in, nothing of torch. Importing it touches no
// driver; a launch that cannot run raises RuntimeError naming the kernel. Callers check dtypes, shapes and strides.
#include <pybind11/pybind11.h>

#include "engine.h"

namespace py = pybind11;
using namespace bgpo;
using namespace bgpo::cuda;

#ifndef BGPO_ARCHS
#define BGPO_ARCHS ""
#endif

namespace {

Queue make_queue(int device, uintptr_t stream) { return {device, pointer<void>(stream)}; }

DrawArgs make_draw(uintptr_t ids, uintptr_t response, uintptr_t prompt, uintptr_t sample_ids, int64_t batch,
                   int64_t tokens, int64_t n, int64_t lo, int64_t hi, uint64_t seed, int scheme, int schedule,
                   uintptr_t thresholds, uintptr_t table_weights, uintptr_t table_start, int64_t mask_token_id,
                   int64_t prompt_threshold) {
    return {pointer<const int64_t>(ids), pointer<const uint8_t>(response), pointer<const uint8_t>(prompt),
            pointer<const int64_t>(sample_ids), batch, tokens, n, lo, hi, seed, scheme, schedule,
            pointer<const int64_t>(thresholds), pointer<const float>(table_weights),
            pointer<const int64_t>(table_start), mask_token_id, prompt_threshold};
}

ChunkSegments make_segments(uintptr_t offsets, uintptr_t weight, int64_t segments, int64_t begin, uintptr_t advantages,
                            uintptr_t old, uintptr_t length, int64_t first, int64_t samples, double clip_low,
                            double clip_high, double dual_clip, double divisor, uintptr_t sums, uintptr_t row_grad) {
    return {pointer<const int64_t>(offsets), pointer<const float>(weight), segments, begin,
            pointer<const void>(advantages), pointer<const void>(old), pointer<const float>(length), first, samples,
            Clip{clip_low, clip_high, dual_clip}, divisor, pointer<void>(sums), pointer<void>(row_grad)};
}

template <typename T>
void call_segment_sum(const Queue& queue, uintptr_t values, uintptr_t offsets, uintptr_t weight, int64_t segments,
                      uintptr_t out) {
    segment_sum(queue, pointer<const T>(values), pointer<const int64_t>(offsets), pointer<const float>(weight),
                segments, pointer<T>(out));
}

template <typename T>
void call_bound(const Queue& queue, uintptr_t logprob, uintptr_t advantages, uintptr_t old, uintptr_t length,
                int64_t batch, int64_t n, double clip_low, double clip_high, double dual_clip, uintptr_t term,
                uintptr_t slope) {
    bound(queue, pointer<const T>(logprob), pointer<const T>(advantages), pointer<const T>(old),
          pointer<const float>(length), batch, n, Clip{clip_low, clip_high, dual_clip}, pointer<T>(term),
          pointer<T>(slope));
}

void define_types(py::module_& m) {
    py::class_<Queue>(m, "Queue", py::module_local()).def(py::init(&make_queue));
    py::class_<Chunk>(m, "Chunk", py::module_local()).def(py::init(&make_chunk));
    py::class_<ChunkSegments>(m, "Segments", py::module_local()).def(py::init(&make_segments));
    py::class_<DrawArgs>(m, "Draw", py::module_local()).def(py::init(&make_draw));
    m.attr("LOGIT_FLOAT") = static_cast<int>(LogitType::kFloat);
    m.attr("LOGIT_BFLOAT16") = static_cast<int>(LogitType::kBFloat16);
    m.attr("LOGIT_DOUBLE") = static_cast<int>(LogitType::kDouble);
    m.attr("LOGIT_HALF") = static_cast<int>(LogitType::kHalf);
}

void define_kernels(py::module_& m) {
    using release = py::call_guard<py::gil_scoped_release>;
    m.def("row_statistics", &row_statistics, release());
    m.def("dlogits", [](const Queue& queue, const Chunk& chunk, uintptr_t grad_logprob, uintptr_t grad_entropy,
                        int out) {
        dlogits(queue, chunk, pointer<const void>(grad_logprob), pointer<const void>(grad_entropy),
                static_cast<LogitType>(out));
    }, release());
    m.def("bound_dlogits", [](const Queue& queue, const Chunk& chunk, const ChunkSegments& segments, int out) {
        bound_dlogits(queue, chunk, segments, static_cast<LogitType>(out));
    }, release());
    m.def("draw_masks", [](const Queue& queue, const DrawArgs& args, uintptr_t noisy, uintptr_t rows, uintptr_t targets,
                           uintptr_t count, uintptr_t weight, uintptr_t offsets, uintptr_t state) {
        draw_masks(queue, args,
                   {pointer<int64_t>(noisy), pointer<int64_t>(rows), pointer<int64_t>(targets), pointer<int32_t>(count),
                    pointer<float>(weight), pointer<int64_t>(offsets)},
                   pointer<uint64_t>(state));
    }, release());
    m.def("segment_sum_f32", &call_segment_sum<float>, release());
    m.def("segment_sum_f64", &call_segment_sum<double>, release());
    m.def("bound_f32", &call_bound<float>, release());
    m.def("bound_f64", &call_bound<double>, release());
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "Compiled CUDA kernels of bgpo_kernels";
    define_types(m);
    define_kernels(m);
    m.def("device_count", &device_count, "Devices the driver offers; 0 without a driver");
    m.attr("ARCHS") = BGPO_ARCHS;                 // as in BGPO_KERNELS_ARCHS
    m.attr("TOOLKIT_VERSION") = toolkit_version();  // 13000 for CUDA 13.0
}
