// What doormen say of shapes before a graph runs.
#pragma once

#include <atomic>

#include "op.h"

namespace calmclip {

// Whether the API call went well; what it complained of is forgotten.
inline bool went(OrtStatusPtr status) { return Ort::Status(status).IsOK(); }

// A shape as far as it is known before a graph runs: -1, and a name or "", for what is not.
struct Known {
  std::vector<int64_t> dims;
  std::vector<std::string> names;

  // Of the input; without dims where its rank is not known.
  static Known input(OrtShapeInferContext* context, size_t index) {
    const OrtApi& api = Ort::GetApi();
    OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own
    size_t rank = 0;
    if (!went(api.ShapeInferContext_GetInputTypeShape(context, index, &info)) || !info ||
        !went(api.GetDimensionsCount(info, &rank)))
      return {};
    Known found{std::vector<int64_t>(rank), std::vector<std::string>(rank)};
    std::vector<const char*> names(rank, "");
    if (!went(api.GetDimensions(info, found.dims.data(), rank)) ||
        !went(api.GetSymbolicDimensions(info, names.data(), rank)))
      return {};
    for (size_t i = 0; i < rank; ++i) found.names[i] = names[i] ? names[i] : "";
    return found;
  }

  void set(size_t axis, int64_t side) {
    dims[axis] = side;
    names[axis].clear();
  }

  OrtStatusPtr output(OrtShapeInferContext* context, size_t index, ONNXTensorElementDataType type) const {
    const OrtApi& api = Ort::GetApi();
    // For ONNX Runtime a side without a name is its number, and -1 one that fits no other: it refuses a graph where such a
    // side meets one that is known. So what is not known has a name that nobody else has.
    static std::atomic<uint64_t> number = 0;
    std::vector<std::string> own = names;
    std::vector<const char*> raw;
    for (size_t i = 0; i < own.size(); ++i) {
      if (dims[i] < 0 && own[i].empty()) own[i] = std::string(kDomain) + "." + std::to_string(number++);
      raw.push_back(own[i].c_str());
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

// The attribute's integers; none where they cannot be read.
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
