// Softmax over one axis, plain or clipped. Source: Bondarenko et al. 2023 (arXiv 2306.12929), equation 4.
#include <atomic>
#include <memory>
#include <new>

#include "../kernels/softmax_forms.h"
#include "op.h"
#include "shapes.h"

namespace calmclip {
namespace {

constexpr size_t kGrain = 16384;   // elements that are worth a thread, as in ONNX Runtime's own Softmax
constexpr size_t kColumns = 16;    // columns gathered at a time if the axis is not the last: a cache line of floats
constexpr size_t kGather = 65536;  // or fewer, so that they take at most this many floats

// ONNX Runtime fills in no defaults for a custom operator. It distinguishes "absent" and "of another type" by text
// only.
bool has_other_type(const OrtKernelInfo* info, const char* name) {
  const OrtApi& api = Ort::GetApi();
  int64_t integer;
  float number;
  size_t size = 0;
  Ort::AllocatorWithDefaultOptions allocator;
  OrtValue* tensor = nullptr;
  if (went(api.KernelInfoGetAttribute_tensor(info, name, allocator, &tensor))) return Ort::Value(tensor), true;
  return went(api.KernelInfoGetAttribute_int64(info, name, &integer)) ||
         went(api.KernelInfoGetAttribute_float(info, name, &number)) ||
         went(api.KernelInfoGetAttribute_string(info, name, nullptr, &(size = 0))) ||
         went(api.KernelInfoGetAttributeArray_int64(info, name, nullptr, &(size = 0))) ||
         went(api.KernelInfoGetAttributeArray_float(info, name, nullptr, &(size = 0)));
}

template <class T, class Get>
T attribute(const OrtKernelInfo* info, const char* name, const char* type, T otherwise, Get get) {
  T value;
  if (went(get(info, name, &value))) return value;
  if (has_other_type(info, name))
    throw Ort::Exception("Softmax: the attribute " + std::string(name) + " is not " + type, ORT_INVALID_ARGUMENT);
  return otherwise;
}

// One row for each (outer, inner); the values along the axis are between; contiguous if inner is 1.
struct Rows {
  size_t outer = 1, cols = 1, inner = 1;
};

class Softmax {
 public:
  explicit Softmax(Ort::ConstKernelInfo info)
      : axis_(attribute<int64_t>(info, "axis", "an integer", -1, Ort::GetApi().KernelInfoGetAttribute_int64)),
        gamma_(attribute<float>(info, "gamma", "a float", 0, Ort::GetApi().KernelInfoGetAttribute_float)),
        zeta_(attribute<float>(info, "zeta", "a float", 1, Ort::GetApi().KernelInfoGetAttribute_float)) {
    if (!(gamma_ <= 0 && zeta_ >= 1 && gamma_ >= -1e30f && zeta_ <= 1e30f))  // beyond, zeta - gamma may be infinite
      throw Ort::Exception("Softmax: gamma is " + std::to_string(gamma_) + " and zeta " + std::to_string(zeta_) +
                               "; expected -1e30 <= gamma <= 0 and 1 <= zeta <= 1e30",
                           ORT_INVALID_ARGUMENT);
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      const auto input = context.GetInput(0);
      const auto shape = input.GetTensorTypeAndShapeInfo().GetShape();
      const auto rank = static_cast<int64_t>(shape.size());
      if (axis_ < -rank || axis_ >= rank)  // with rank 0 every axis is out of range
        return refuse("Softmax: axis is " + std::to_string(axis_) + " and x has the shape " + text(shape) +
                      "; expected an axis that x has");
      auto output = context.GetOutput(0, shape);
      if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return nullptr;
      const auto axis = static_cast<size_t>(axis_ < 0 ? axis_ + rank : axis_);
      Rows rows;
      for (size_t i = 0; i < shape.size(); ++i)
        (i < axis ? rows.outer : i == axis ? rows.cols : rows.inner) *= static_cast<size_t>(shape[i]);
      const float* x = input.GetTensorData<float>();
      float* y = output.GetTensorMutableData<float>();
      return rows.inner == 1 ? contiguous(context, x, y, rows) : strided(context, x, y, rows);
    });
  }

 private:
  OrtStatusPtr contiguous(Ort::KernelContext& context, const float* x, float* y, const Rows& rows) const {
    const size_t cols = rows.cols;
    const double bytes = static_cast<double>(rows.outer) * static_cast<double>(cols) * (x == y ? 4 : 8);
    const SoftmaxForm& form = softmax_form(cols, bytes);
    SoftmaxRows* run = kernels().*form.rows;
    spread(context, rows.outer, kGrain / cols, [&](size_t first, size_t last) {
      run(x + first * cols, y + first * cols, last - first, cols, gamma_, zeta_, form.stream);
    });
    return nullptr;
  }

  // Gathers a few columns at a time into rows, and scatters the results. An exception stays on its thread.
  OrtStatusPtr strided(Ort::KernelContext& context, const float* x, float* y, const Rows& rows) const {
    const size_t cols = rows.cols, inner = rows.inner;
    const size_t width = std::clamp<size_t>(kGather / cols, 1, std::min(kColumns, inner));
    const size_t pieces = (inner + width - 1) / width;
    std::atomic<bool> room = true;
    spread(context, rows.outer * pieces, kGrain / (width * cols), [&](size_t first, size_t last) {
      const std::unique_ptr<float[]> buffer(new (std::nothrow) float[width * cols]);
      if (!buffer) {
        room = false;
        return;
      }
      for (size_t piece = first; piece < last; ++piece) {
        const size_t column = piece % pieces * width, count = std::min(width, inner - column);
        const size_t start = piece / pieces * cols * inner + column;
        for (size_t i = 0; i < cols; ++i)
          for (size_t k = 0; k < count; ++k) buffer[k * cols + i] = x[start + i * inner + k];
        kernels().softmax_reload(buffer.get(), buffer.get(), count, cols, gamma_, zeta_, false);
        for (size_t i = 0; i < cols; ++i)
          for (size_t k = 0; k < count; ++k) y[start + i * inner + k] = buffer[k * cols + i];
      }
    });
    if (!room) return Ort::GetApi().CreateStatus(ORT_FAIL, "Softmax: out of memory");
    return nullptr;
  }

  int64_t axis_;
  float gamma_, zeta_;
};

struct Schema : Op<Schema, Softmax> {
  static constexpr const char* kOpName = "Softmax";
  static constexpr Type kInputTypes[] = {kFloat}, kOutputTypes[] = {kFloat};
  static inline int in_place[] = {0};
  static OrtStatusPtr infer(OrtShapeInferContext* context) { return same_shape(context, 0, kFloat); }
};

}  // namespace

DEFINE_OP(softmax, Schema)

}  // namespace calmclip
