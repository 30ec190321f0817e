// Shape inference of the op wrappers, before a graph runs.
#pragma once

#include <atomic>

#include "op.h"

namespace calmclip {

// The number of windows of `size` that fit into a side of a picture, one stride apart.
constexpr int64_t windows(int64_t side, int64_t before, int64_t behind, int64_t size, int64_t stride) {
  const int64_t room = side + before + behind - size;
  return room < 0 ? 0 : room / stride + 1;
}

// Whether the API call succeeded; its error is dropped.
inline bool went(OrtStatusPtr status) { return Ort::Status(status).IsOK(); }

// A shape as far as it is known before a graph runs. An unknown side is -1 with a name or "".
struct Known {
  std::vector<int64_t> dims;
  std::vector<std::string> names;

  // The shape of an input; without dims if the rank is unknown.
  static Known input(OrtShapeInferContext* context, size_t index) {
    const OrtApi& api = Ort::GetApi();
    OrtTensorTypeAndShapeInfo* info = nullptr;  // owned by the context
    size_t rank = 0;
    if (!went(api.ShapeInferContext_GetInputTypeShape(context, index, &info)) || !info ||
        !went(api.GetDimensionsCount(info, &rank)))
      return {};
    Known known{std::vector<int64_t>(rank), std::vector<std::string>(rank)};
    std::vector<const char*> names(rank, "");
    if (!went(api.GetDimensions(info, known.dims.data(), rank)) ||
        !went(api.GetSymbolicDimensions(info, names.data(), rank)))
      return {};
    for (size_t i = 0; i < rank; ++i) known.names[i] = names[i] ? names[i] : "";
    return known;
  }

  void set(size_t axis, int64_t side) {
    dims[axis] = side;
    names[axis].clear();
  }

  OrtStatusPtr output(OrtShapeInferContext* context, size_t index, Type type) const {
    const OrtApi& api = Ort::GetApi();
    // ONNX Runtime compares sides without a name by number, and -1 then equals no known side: it refuses such a graph.
    // So every unknown side gets a name that no other side has.
    static std::atomic<uint64_t> number = 0;
    std::vector<std::string> unique = names;
    std::vector<const char*> raw;
    for (size_t i = 0; i < unique.size(); ++i) {
      if (dims[i] < 0 && unique[i].empty()) unique[i] = std::string(kDomain) + "." + std::to_string(number++);
      raw.push_back(unique[i].c_str());
    }
    OrtTensorTypeAndShapeInfo* info = nullptr;
    Ort::ThrowOnError(api.CreateTensorTypeAndShapeInfo(&info));
    OrtStatusPtr status = api.SetTensorElementType(info, type);
    if (!status) status = api.SetDimensions(info, dims.data(), dims.size());
    if (!status) status = api.SetSymbolicDimensions(info, raw.data(), raw.size());
    if (!status) status = api.ShapeInferContext_SetOutputTypeShape(context, index, info);
    api.ReleaseTensorTypeAndShapeInfo(info);
    return status;
  }
};

// An output of the shape of an input; nothing if its rank is unknown, or 0.
inline OrtStatusPtr same_shape(OrtShapeInferContext* context, size_t input, Type type) {
  const Known shape = Known::input(context, input);
  return shape.dims.empty() ? nullptr : shape.output(context, 0, type);
}

// The integers of an attribute; empty if it cannot be read.
template <size_t n>
std::vector<int64_t> known_attribute(OrtShapeInferContext* context, const char* name, OrtOpAttrType type) {
  const OrtApi& api = Ort::GetApi();
  const OrtOpAttr* attribute = nullptr;
  int64_t values[n];
  size_t bytes = 0;
  if (!went(api.ShapeInferContext_GetAttribute(context, name, &attribute)) || !attribute ||
      !went(api.ReadOpAttr(attribute, type, values, sizeof values, &bytes)) || bytes != sizeof values)
    return {};
  return {values, values + n};
}

}  // namespace calmclip
