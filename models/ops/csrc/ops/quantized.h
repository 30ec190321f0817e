// Shared by the op wrappers of quantized operators: inputs by name, checked scales and zero points.
#pragma once

#include <array>
#include <cmath>

#include "op.h"
#include "shapes.h"

namespace calmclip {

// An operator's name, for its error messages.
class Named {
 public:
  explicit Named(const char* op) : op_(op) {}

  [[noreturn]] void invalid(const std::string& what) const {
    throw Ort::Exception(op_ + (": " + what), ORT_INVALID_ARGUMENT);
  }

  template <class T>
  T attribute(Ort::ConstKernelInfo info, const char* name) const {
    try {
      return info.GetAttribute<T>(name);
    } catch (const Ort::Exception& error) {
      invalid("the attribute " + std::string(name) + " cannot be read: " + error.what());
    }
  }

  // An integer attribute of at least `least`.
  size_t size(Ort::ConstKernelInfo info, const char* name, int64_t least) const {
    const auto value = attribute<int64_t>(info, name);
    if (value < least || value > INT32_MAX)
      invalid(std::string(name) + " is " + std::to_string(value) + "; expected " + std::to_string(least) + " to " +
              std::to_string(INT32_MAX));
    return static_cast<size_t>(value);
  }

  // An attribute of n integers of at least `least`.
  template <size_t n>
  std::array<int64_t, n> sizes(Ort::ConstKernelInfo info, const char* name, int64_t least) const {
    std::vector<int64_t> values;
    try {
      values = info.GetAttributes<int64_t>(name);
    } catch (const Ort::Exception& error) {
      invalid("the attribute " + std::string(name) + " cannot be read: " + error.what());
    }
    if (values.size() != n || *std::min_element(values.begin(), values.end()) < least ||
        *std::max_element(values.begin(), values.end()) > INT32_MAX)
      invalid(std::string(name) + " is " + text(values) + "; expected " + std::to_string(n) + " numbers, " +
              std::to_string(least) + " to " + std::to_string(INT32_MAX));
    std::array<int64_t, n> result{};
    std::copy(values.begin(), values.end(), result.begin());
    return result;
  }

 private:
  const char* op_;
};

// An input: its data and its shape.
template <class T>
struct Input {
  Input(const Named& op, Ort::KernelContext& context, size_t index, const char* input)
      : Input(op, context.GetInput(index), input) {}

  // From a run, or from a constant of the graph.
  Input(const Named& op, Ort::ConstValue value, const char* input)
      : op_(op), name(input), value_(value), shape(value_.GetTensorTypeAndShapeInfo().GetShape()) {
    data = value_.GetTensorData<T>();
    for (const int64_t side : shape) count *= static_cast<size_t>(side);
  }

  [[noreturn]] void refuse(const std::string& expected) const {
    op_.invalid(std::string(name) + " has the shape " + text(shape) + "; expected " + expected);
  }

  size_t side(size_t axis) const { return static_cast<size_t>(shape[axis]); }

  // The only number of the input.
  T number() const {
    if (count != 1) refuse("one number");
    return *data;
  }

  // Whether there is one number for each of n columns; otherwise there is one for all.
  bool columns(size_t n) const {
    if (shape.size() == 1 && side(0) == n) return true;
    if (count != 1) refuse("one number, or [" + std::to_string(n) + "]");
    return false;
  }

  // Scales are positive and normal.
  void check_scales() const {
    for (size_t i = 0; i < count; ++i)
      if (!(data[i] > 0 && std::isnormal(data[i])))
        op_.invalid(std::string(name) + (count > 1 ? "[" + std::to_string(i) + "]" : "") + " is " +
                    std::to_string(data[i]) + "; expected a positive, normal number");
  }

  float scale() const {
    const float value = number();
    check_scales();
    return value;
  }

 private:
  const Named& op_;

 public:
  const char* name;

 private:
  Ort::ConstValue value_;

 public:
  std::vector<int64_t> shape;
  const T* data;
  size_t count = 1;
};

// The quantizer of an output: 1 / scale and zero point, for each of n columns, or one of each for all columns.
struct Steps {
  Steps(const Input<float>& scale, const Input<uint8_t>& point, size_t n) {
    const bool scales = scale.columns(n), points = point.columns(n);
    scale.check_scales();
    inverse.resize(scales || points ? n : 1);
    zero.resize(inverse.size());
    for (size_t i = 0; i < inverse.size(); ++i) {
      inverse[i] = 1 / scale.data[scales ? i : 0];
      zero[i] = point.data[points ? i : 0];
    }
  }

  std::vector<float> inverse;
  std::vector<int32_t> zero;
};

// A constant of the graph; null if the input is fed.
inline Ort::ConstValue constant(Ort::ConstKernelInfo info, size_t input) {
  int is_constant = 0;
  return info.GetTensorConstantInput(input, &is_constant);
}

}  // namespace calmclip
