// Shared by the op wrappers: checked inputs, statuses, work on ONNX Runtime's threads.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

namespace calmclip {

inline constexpr const char* kDomain = "ai.calmclip";

inline OrtStatusPtr refuse(const std::string& message) {
  return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, message.c_str());
}

inline std::string text(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

// Turns C++ exceptions into statuses; none may reach ONNX Runtime.
template <class Body>
OrtStatusPtr guarded(Body body) noexcept {
  try {
    return body();
  } catch (const Ort::Exception& error) {
    return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
  } catch (const std::bad_alloc&) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, "out of memory");
  } catch (const std::exception& error) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
  }
}

// Calls body(first, last) for parts of [0, total) of at least `grain`, on ONNX Runtime's intra-op threads and this one.
template <class Body>
void spread(Ort::KernelContext& context, size_t total, size_t grain, const Body& body) {
  const size_t parts = std::clamp<size_t>(total / std::max<size_t>(grain, 1), 1, 64);
  if (parts == 1) return body(size_t{0}, total);
  struct Task {
    const Body& body;
    size_t total, parts;
  } task{body, total, parts};
  context.ParallelFor(
      [](void* data, size_t part) {
        const Task& t = *static_cast<const Task*>(data);
        t.body(t.total * part / t.parts, t.total * (part + 1) / t.parts);
      },
      parts, 0, &task);
}

using Type = ONNXTensorElementDataType;
inline constexpr Type kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kInt64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
inline constexpr Type kUint8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, kInt8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;

// One operator. ONNX Runtime constructs a `Kernel` for each node; it reads the attributes, and then computes. `Schema`
// has kOpName, and kInputTypes and kOutputTypes in the order of spec.py. It may have infer(context), which states the
// shapes that are known before a run, and in_place, the inputs whose memory the first output may have.
template <class Schema, class Kernel>
struct Op : Ort::CustomOpBase<Schema, Kernel, /*WithStatus=*/true> {
  Op() {
    if constexpr (requires(OrtShapeInferContext* context) { Schema::infer(context); })
      OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
        return guarded([&] { return Schema::infer(context); });
      };
    if constexpr (requires { Schema::in_place; }) {
      OrtCustomOp::GetMayInplace = [](int** inputs, int** outputs) -> size_t {
        static int first_output[std::size(Schema::in_place)] = {};
        *inputs = Schema::in_place;
        *outputs = first_output;
        return std::size(Schema::in_place);
      };
      OrtCustomOp::ReleaseMayInplace = [](int*, int*) {};
    }
  }

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&]() -> OrtStatusPtr {
      *kernel = new Kernel(Ort::ConstKernelInfo(info));
      return nullptr;
    });
  }
  const char* GetName() const { return Schema::kOpName; }
  size_t GetInputTypeCount() const { return std::size(Schema::kInputTypes); }
  Type GetInputType(size_t input) const { return Schema::kInputTypes[input]; }
  size_t GetOutputTypeCount() const { return std::size(Schema::kOutputTypes); }
  Type GetOutputType(size_t output) const { return Schema::kOutputTypes[output]; }
};

// Defines key_op(), which ops.inc declares.
#define DEFINE_OP(key, ...)        \
  const OrtCustomOp* key##_op() {  \
    static const __VA_ARGS__ op;   \
    return &op;                    \
  }

#define OP(key) const OrtCustomOp* key##_op();
#include "ops.inc"
#undef OP

}  // namespace calmclip
