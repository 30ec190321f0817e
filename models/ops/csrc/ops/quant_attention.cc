// Attention on uint8: softmax(q k^T + mask) v for each head.
// Source: Bondarenko et al. 2023 (arXiv 2306.12929), section 5.
#include "../kernels/quant_attention.h"

#include <atomic>
#include <functional>
#include <memory>
#include <new>
#include <optional>

#include "../kernels/dispatch.h"
#include "quantized.h"

namespace calmclip {
namespace {

constexpr size_t kGrain = 1 << 20;  // products that are worth a thread: about 8 us
constexpr size_t kUnits = 8;        // with fewer heads than this, the rows of a head are also divided among threads,
constexpr size_t kRows = 64;        // at least this many rows in a part, because each part lays out all of k and v

enum Place { kQ, kQScale, kQZero, kK, kKScale, kV, kVScale, kPScale, kMask, kYScale, kYZero };

const Named kOp("QuantAttention");

// The inputs by index: of a run, or the constants of the graph.
using Inputs = std::function<Ort::ConstValue(Place)>;

// The scales and zero points. Constants of the graph are read once, when the node's kernel is constructed: in a run each
// input costs several calls of ONNX Runtime.
struct Numbers {
  float scale, v_scale, p_scale;
  uint8_t q_zero;
  std::vector<float> y_scale;  // one number, or one for each column
  std::vector<uint8_t> y_zero;
};
constexpr Place kNumbers[] = {kQScale, kQZero, kKScale, kVScale, kPScale, kYScale, kYZero};

// The strides of the mask: for each axis the step to the next number, 0 if one number serves all.
struct Mask {
  const float* data = nullptr;
  size_t batch = 0, head = 0, row = 0, key = 0;
  std::vector<uint32_t> seen;  // attention_seen of each row of the mask, in order; empty if unknown

  const float* of(size_t b, size_t h) const { return data ? data + b * batch + h * head : nullptr; }
  const uint32_t* seen_of(size_t b, size_t h) const {
    return seen.empty() ? nullptr : seen.data() + (b * batch + h * head) / keys;
  }
  size_t keys = 1;
};

struct Sizes {
  size_t batch, rows, keys;
};

class Attention {
 public:
  explicit Attention(Ort::ConstKernelInfo info)
      : heads_(kOp.size(info, "heads", 1)),
        width_(kOp.size(info, "width", 1)),
        starts_{kOp.size(info, "q_start", 0), kOp.size(info, "k_start", 0), kOp.size(info, "v_start", 0)},
        gamma_(kOp.attribute<float>(info, "gamma")),
        zeta_(kOp.attribute<float>(info, "zeta")) {
    if (width_ % heads_ || width_ / heads_ > kMostDims)
      kOp.invalid("width is " + std::to_string(width_) + " and heads " + std::to_string(heads_) +
                  "; expected a width that is a multiple of heads, at most " + std::to_string(kMostDims) + " each");
    if (!(gamma_ <= 0 && zeta_ >= 1 && gamma_ >= -1e30f && zeta_ <= 1e30f))
      kOp.invalid("gamma is " + std::to_string(gamma_) + " and zeta " + std::to_string(zeta_) +
                  "; expected -1e30 <= gamma <= 0 and 1 <= zeta <= 1e30");
    const Inputs inputs = [&](Place place) { return constant(info, place); };
    bool all = true;
    for (const Place place : kNumbers) all &= static_cast<bool>(inputs(place));
    if (all) numbers_.emplace(numbers(inputs));
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      const Input<uint8_t> q(kOp, context, kQ, "q"), k(kOp, context, kK, "k"), v(kOp, context, kV, "v");
      std::optional<Numbers> fed;
      if (!numbers_) fed.emplace(numbers([&](Place place) { return context.GetInput(place); }));
      const Numbers& of = numbers_ ? *numbers_ : *fed;
      const Input<float> mask_input(kOp, context, kMask, "mask");
      const Sizes sizes = check(q, k, v);
      const bool scales = of.y_scale.size() > 1, zeros = of.y_zero.size() > 1;
      const Mask mask = mask_of(mask_input, sizes, of.scale);

      const size_t dims = width_ / heads_;
      AttentionHead head{};
      head.q_step = q.side(2), head.k_step = k.side(2), head.v_step = v.side(2), head.y_step = width_;
      head.keys = sizes.keys, head.dims = dims;
      head.mask_row = mask.row, head.mask_key = mask.key, head.seen_step = mask.row != 0;
      head.y_scale_step = scales, head.y_zero_step = zeros;
      head.scale = of.scale, head.v_scale = of.v_scale, head.gamma = gamma_, head.zeta = zeta_;
      head.q_zero = of.q_zero, head.p_scale = of.p_scale;
      auto output = context.GetOutput(0, {q.shape[0], q.shape[1], static_cast<int64_t>(width_)});
      if (sizes.batch == 0 || sizes.rows == 0) return nullptr;
      uint8_t* const y = output.GetTensorMutableData<uint8_t>();

      const size_t all = sizes.batch * heads_;
      const size_t shares = all >= kUnits ? 1 : std::clamp<size_t>(sizes.rows / kRows, 1, (kUnits + all - 1) / all);
      const size_t products = 2 * (sizes.rows / shares + 16) * sizes.keys * dims;
      std::atomic<bool> room = true;
      spread(context, all * shares, kGrain / products, [&](size_t first, size_t last) {
        const std::unique_ptr<uint8_t[]> memory(new (std::nothrow) uint8_t[attention_scratch(sizes.keys, dims) + 64]);
        if (!memory) {
          room = false;
          return;
        }
        uint8_t* const scratch = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
        for (size_t unit = first; unit < last; ++unit) {
          const size_t share = unit % shares, h = unit / shares % heads_, b = unit / shares / heads_;
          // whole blocks of 16 rows, as the kernels take them
          const size_t blocks = (sizes.rows + 15) / 16;
          const size_t start = blocks * share / shares * 16;
          const size_t end = std::min(sizes.rows, blocks * (share + 1) / shares * 16);
          AttentionHead mine = head;
          const auto lies = [&](const Input<uint8_t>& x, size_t row, size_t column) {
            return x.data + row * x.side(2) + column + h * dims;
          };
          mine.q = lies(q, b * sizes.rows + start, starts_[0]);
          mine.k = lies(k, b * sizes.keys, starts_[1]);
          mine.v = lies(v, b * sizes.keys, starts_[2]);
          mine.y = y + (b * sizes.rows + start) * width_ + h * dims;
          mine.rows = end - start;
          if (mask.data) mine.mask = mask.of(b, h) + start * mask.row;
          if (!mask.seen.empty()) mine.seen = mask.seen_of(b, h) + start * mine.seen_step;
          mine.y_scale = of.y_scale.data() + (scales ? h * dims : 0);
          mine.y_zero = of.y_zero.data() + (zeros ? h * dims : 0);
          kernels().quant_attention(mine, scratch);
        }
      });
      if (!room) return Ort::GetApi().CreateStatus(ORT_FAIL, "QuantAttention: out of memory");
      return nullptr;
    });
  }

 private:
  Numbers numbers(const Inputs& inputs) const {
    const auto floats = [&](Place place, const char* name) { return Input<float>(kOp, inputs(place), name); };
    const Input<float> y_scale = floats(kYScale, "y_scale");
    const Input<uint8_t> q_zero(kOp, inputs(kQZero), "q_zero"), y_zero(kOp, inputs(kYZero), "y_zero");
    const bool scales = y_scale.columns(width_), zeros = y_zero.columns(width_);
    y_scale.check_scales();
    return {floats(kQScale, "q_scale").scale() * floats(kKScale, "k_scale").scale(),
            floats(kVScale, "v_scale").scale(),
            step_of(floats(kPScale, "p_scale")),
            q_zero.number(),
            {y_scale.data, y_scale.data + (scales ? width_ : 1)},
            {y_zero.data, y_zero.data + (zeros ? width_ : 1)}};
  }

  Sizes check(const Input<uint8_t>& q, const Input<uint8_t>& k, const Input<uint8_t>& v) const {
    const Input<uint8_t>* inputs[] = {&q, &k, &v};
    for (size_t i = 0; i < 3; ++i) {
      const Input<uint8_t>& x = *inputs[i];
      if (x.shape.size() != 3) x.refuse("[batch, tokens, columns]");
      if (x.side(2) < starts_[i] + width_)
        x.refuse(std::to_string(width_) + " columns from " + std::to_string(starts_[i]) + " on");
    }
    if (k.shape[0] != q.shape[0]) k.refuse("the batch of q, " + std::to_string(q.shape[0]));
    if (v.shape[0] != k.shape[0] || v.shape[1] != k.shape[1])
      v.refuse("the batch and tokens of k, " + text({k.shape[0], k.shape[1]}));
    if (k.side(1) < 1 || k.side(1) > kMostKeys) k.refuse("1 to " + std::to_string(kMostKeys) + " tokens");
    return {q.side(0), q.side(1), k.side(1)};
  }

  // 0: normalize by the row maximum, which excludes clipping.
  float step_of(const Input<float>& p_scale) const {
    if (p_scale.number() != 0) return p_scale.scale();
    if (gamma_ != 0 || zeta_ != 1)
      kOp.invalid("p_scale is 0, gamma " + std::to_string(gamma_) + " and zeta " + std::to_string(zeta_) +
                  "; expected a p_scale over 0, or gamma 0 and zeta 1");
    return 0;
  }

  Mask mask_of(const Input<float>& mask, const Sizes& sizes, float scale) const {
    if (mask.shape.size() == 1 && mask.count == 1) {
      if (*mask.data != 0)
        kOp.invalid("mask is one number, " + std::to_string(*mask.data) + "; expected 0, which means no mask");
      return {};
    }
    const size_t sides[] = {sizes.batch, heads_, sizes.rows, sizes.keys};
    size_t steps[4] = {}, step = 1;
    const size_t rank = mask.shape.size();
    bool fits = rank >= 2 && rank <= 4;
    for (size_t i = 0; fits && i < rank; ++i) {
      const size_t axis = 3 - i, side = mask.side(rank - 1 - i);
      fits = side == 1 || side == sides[axis];
      if (side != 1) steps[axis] = step;
      step *= side;
    }
    if (!fits)
      mask.refuse("[1], or what can be broadcast to [" + std::to_string(sizes.batch) + ", " + std::to_string(heads_) +
                  ", " + std::to_string(sizes.rows) + ", " + std::to_string(sizes.keys) + "]");
    Mask result{mask.data, steps[0], steps[1], steps[2], steps[3], {}, sizes.keys};
    // a mask that lowers every logit so far that its exp is under the smallest float
    const double hides = -2 * attention_reach(width_ / heads_) * double{scale} - 104;
    if (hides > -1e30 && steps[3] == 1) {
      result.seen.resize(mask.count / sizes.keys);
      for (size_t i = 0; i < result.seen.size(); ++i)
        result.seen[i] = attention_seen(mask.data + i * sizes.keys, sizes.keys, static_cast<float>(hides));
    }
    return result;
  }

  size_t heads_, width_, starts_[3];
  float gamma_, zeta_;
  std::optional<Numbers> numbers_;  // if all are constants
};

struct Schema : Op<Schema, Attention> {
  static constexpr const char* kOpName = "QuantAttention";
  static constexpr Type kInputTypes[] = {kUint8, kFloat, kUint8, kUint8, kFloat, kUint8, kFloat, kFloat, kFloat, kFloat, kUint8};
  static constexpr Type kOutputTypes[] = {kUint8};

  // [B, T, W]
  static OrtStatusPtr infer(OrtShapeInferContext* context) {
    Known q = Known::input(context, kQ);
    const auto width = known_attribute<1>(context, "width", ORT_OP_ATTR_INT);
    if (q.dims.size() != 3 || width.empty()) return nullptr;
    q.set(2, width[0]);
    return q.output(context, 0, kUint8);
  }
};

}  // namespace

DEFINE_OP(quant_attention, Schema)

}  // namespace calmclip
