// What the doormen share: checked inputs, statuses, work spread over ONNX Runtime's threads.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <algorithm>
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

// Nothing that C++ throws may cross into ONNX Runtime.
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

// body(first, last) over [0, total) in parts of at least `grain`, on ONNX Runtime's intra-op threads; one part runs here.
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

// One operator: `Kernel` is made for a node, reads its attributes, and computes. `Schema` names inputs and outputs.
template <class Schema, class Kernel>
struct Op : Ort::CustomOpBase<Schema, Kernel, /*WithStatus=*/true> {
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&]() -> OrtStatusPtr {
      *kernel = new Kernel(Ort::ConstKernelInfo(info));
      return nullptr;
    });
  }
};

// All of them; register.cc hands them to ONNX Runtime.
const OrtCustomOp* soft_nms_op();
const OrtCustomOp* softmax_op();
const OrtCustomOp* image_to_pixels_op();
const OrtCustomOp* image_to_quantized_pixels_op();
const OrtCustomOp* quant_linear_op();
const OrtCustomOp* quant_linear_to_float_op();
const OrtCustomOp* quant_pointwise_op();
const OrtCustomOp* quant_attention_op();
const OrtCustomOp* quant_layer_norm_op();
const OrtCustomOp* quant_patches_op();
const OrtCustomOp* quant_depthwise_op();
const OrtCustomOp* quant_lookup_op();
const OrtCustomOp* quant_add_op();

}  // namespace calmclip
