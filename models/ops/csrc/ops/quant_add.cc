// The sum of two uint8 tensors, quantized. Source: Jacob et al. 2017 (arXiv 1712.05877), appendix A.2.
//
// Constants of the graph are prepared once, when the node's kernel is constructed; fed inputs in every run.
#include <functional>
#include <numeric>
#include <optional>

#include "../kernels/dispatch.h"
#include "quantized.h"

namespace calmclip {
namespace {

constexpr size_t kGrain = 131072;       // numbers that are worth a thread: about 8 us
constexpr size_t kNear = 65536;         // bytes of each tensor at a time, by blocks of columns: a part of a cache
constexpr size_t kMostRepeated = 1024;  // columns; with more columns the partial block is a small part
constexpr double kMostFactor = 1 << 20;

enum Place : size_t { kA, kAScale, kAZero, kB, kBScale, kBZero, kYScale, kYZero };

const Named kOp("QuantAdd");

// The inputs by index: of a run, or the constants of the graph.
using Inputs = std::function<Ort::ConstValue(Place)>;

class Add {
 public:
  explicit Add(Ort::ConstKernelInfo info) {
    bool all = true;
    const Inputs inputs = [&](Place place) { return constant(info, place); };
    for (const Place place : kFixed) all &= static_cast<bool>(inputs(place));
    if (all) columns_.emplace(columns(inputs));
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      std::optional<Columns> fed;
      if (!columns_) fed.emplace(columns([&](Place place) { return context.GetInput(place); }));
      const Columns& of = columns_ ? *columns_ : *fed;
      const Input<uint8_t> a(kOp, context, kA, "a"), b(kOp, context, kB, "b");
      if (of.n != 1 && (a.shape.empty() || a.side(a.shape.size() - 1) != of.n))
        a.refuse("[..., " + std::to_string(of.n) + "], because scales or zero points have " + std::to_string(of.n) +
                 " columns");
      if (b.shape != a.shape) b.refuse("that of a, " + text(a.shape));
      auto output = context.GetOutput(0, a.shape);
      if (a.count == 0) return nullptr;
      AddBlock all{};
      all.a = a.data;
      all.b = b.data;
      all.y = output.GetTensorMutableData<uint8_t>();
      all.step = of.wide;
      all.a_factor = of.a_factor.data();
      all.b_factor = of.b_factor.data();
      all.start = of.start.data();
      all.zero = of.zero.data();
      const size_t rows = (a.count + of.wide - 1) / of.wide;
      spread(context, rows, kGrain / of.wide, [&](size_t first, size_t last) {
        run(all, first * of.wide, std::min(last * of.wide, a.count));
      });
      return nullptr;
    });
  }

 private:
  static constexpr Place kFixed[] = {kAScale, kAZero, kBScale, kBZero, kYScale, kYZero};

  // n: the number of columns with constants of their own. The constants of several rows are repeated so that blocks are
  // whole; a tensor is then read in rows of `wide` numbers.
  struct Columns {
    size_t n, wide;
    std::vector<float> a_factor, b_factor, start;
    std::vector<int32_t> zero;
  };

  static Columns columns(const Inputs& inputs) {
    const Input<float> a_scale(kOp, inputs(kAScale), "a_scale"), b_scale(kOp, inputs(kBScale), "b_scale");
    const Input<float> y_scale(kOp, inputs(kYScale), "y_scale");
    const Input<uint8_t> a_zero(kOp, inputs(kAZero), "a_zero"), b_zero(kOp, inputs(kBZero), "b_zero");
    const Input<uint8_t> y_zero(kOp, inputs(kYZero), "y_zero");
    size_t n = 1;
    for (const auto* shape : {&a_scale.shape, &b_scale.shape, &y_scale.shape, &a_zero.shape, &b_zero.shape, &y_zero.shape})
      if (shape->size() == 1 && shape->front() != 1) n = static_cast<size_t>(shape->front());
    for (const auto* scale : {&a_scale, &b_scale, &y_scale}) scale->check_scales();
    const auto each = [n](const auto& input) {
      return [data = input.data, step = input.columns(n) ? size_t{1} : size_t{0}](size_t c) { return data[c * step]; };
    };
    const auto a_step = each(a_scale), b_step = each(b_scale), y_step = each(y_scale);
    const auto a_point = each(a_zero), b_point = each(b_zero), y_point = each(y_zero);
    const size_t wide = n > kMostRepeated ? n : std::lcm(n, kAddBlock);
    const size_t room = (wide + kAddBlock - 1) / kAddBlock * kAddBlock;
    Columns result{n, wide, std::vector<float>(room), std::vector<float>(room), std::vector<float>(room),
                 std::vector<int32_t>(room)};
    for (size_t column = 0; column < wide; ++column) {
      const size_t c = column % n, i = add_place(column);
      const double a = double{a_step(c)} / y_step(c), b = double{b_step(c)} / y_step(c);
      if (std::max(a, b) > kMostFactor)
        kOp.invalid("a scale is " + std::to_string(std::max(a, b)) + " times y_scale; expected at most 2^20 times");
      result.a_factor[i] = static_cast<float>(a);
      result.b_factor[i] = static_cast<float>(b);
      result.start[i] = static_cast<float>(-(a_point(c) * a + b_point(c) * b));
      result.zero[i] = y_point(c);
    }
    return result;
  }

  // From the start of one row to the start of another row, or to the end. `all` has the sizes of a row.
  static void run(const AddBlock& all, size_t from, size_t to) {
    const size_t wide = all.step, near = std::max<size_t>(kNear / wide, 1);
    while (from < to) {
      const size_t rows = std::clamp<size_t>((to - from) / wide, 1, near), end = std::min(wide, to - from);
      for (size_t column = 0; column < end; column += kAddBlock) {
        AddBlock block = all;
        block.a += from + column;
        block.b += from + column;
        block.y += from + column;
        block.rows = rows;
        block.width = std::min(kAddBlock, end - column);
        block.a_factor += column;
        block.b_factor += column;
        block.start += column;
        block.zero += column;
        kernels().quant_add(block);
      }
      from += rows * wide;
    }
  }

  std::optional<Columns> columns_;
};

struct Schema : Op<Schema, Add> {
  static constexpr const char* kOpName = "QuantAdd";
  static constexpr Type kInputTypes[] = {kUint8, kFloat, kUint8, kUint8, kFloat, kUint8, kFloat, kUint8};
  static constexpr Type kOutputTypes[] = {kUint8};
  static inline int in_place[] = {kA, kB};
  static OrtStatusPtr infer(OrtShapeInferContext* context) { return same_shape(context, kA, kUint8); }
};

}  // namespace

DEFINE_OP(quant_add, Schema)

}  // namespace calmclip
