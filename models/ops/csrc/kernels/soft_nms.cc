// One image: applies the score threshold, groups boxes by class, and lays them out for the race of soft_nms.h.
#include "soft_nms.h"

#include <algorithm>
#include <cfloat>
#include <memory>
#include <vector>

#include "dispatch.h"

namespace calmclip {
namespace {

// The boxes at or above the score threshold, class by class, each class in the order of the input.
struct Field {
  std::vector<uint32_t> index;  // into the input
  std::vector<size_t> ends;     // of each class, in `index`
};

Field enter(const float* scores, const int64_t* classes, size_t n, float min_score) {
  Field field;
  field.index.resize(n);
  size_t count = 0;
  for (size_t i = 0; i < n; ++i) {
    field.index[count] = static_cast<uint32_t>(i);
    count += scores[i] >= min_score;
  }
  field.index.resize(count);
  if (classes == nullptr || count < 2) {
    field.ends.push_back(count);
    return field;
  }
  int64_t low = INT64_MAX, high = INT64_MIN;
  for (const uint32_t i : field.index) low = std::min(low, classes[i]), high = std::max(high, classes[i]);
  const uint64_t width = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);  // wraps to the true distance
  if (width < 4 * count + 1024) {
    std::vector<size_t> place(width + 2);
    const auto bucket = [&](uint32_t i) { return static_cast<uint64_t>(classes[i]) - static_cast<uint64_t>(low); };
    for (const uint32_t i : field.index) ++place[bucket(i) + 1];
    for (size_t c = 0; c <= width; ++c) {
      if (place[c + 1]) field.ends.push_back(place[c] + place[c + 1]);
      place[c + 1] += place[c];
    }
    std::vector<uint32_t> sorted(count);
    for (const uint32_t i : field.index) sorted[place[bucket(i)]++] = i;
    field.index.swap(sorted);
  } else {
    std::sort(field.index.begin(), field.index.end(), [&](uint32_t a, uint32_t b) {
      return classes[a] != classes[b] ? classes[a] < classes[b] : a < b;
    });
    for (size_t i = 1; i <= count; ++i)
      if (i == count || classes[field.index[i]] != classes[field.index[i - 1]]) field.ends.push_back(i);
  }
  return field;
}

size_t suppress(SoftNms* race, const float* boxes, const float* scores, const int64_t* classes, size_t n, int method,
                int per_class, float iou_threshold, float sigma, float min_score, size_t max_output, int64_t* kept,
                float* kept_scores) {
  if (n == 0 || max_output == 0) return 0;
  const Field field = enter(scores, per_class ? classes : nullptr, n, min_score);
  const std::vector<uint32_t>& index = field.index;
  const size_t count = index.size();
  if (count == 0) return 0;

  size_t longest = 0, begin = 0;
  for (const size_t end : field.ends) longest = std::max(longest, end - begin), begin = end;
  const size_t most = std::min(count, max_output);
  // x0, y0, x1, y1, area, score; then the results of the races; then their scratch
  const size_t bytes = (7 * count * sizeof(float) + count * sizeof(int32_t) + 63) / 64 * 64;
  const auto memory = std::make_unique_for_overwrite<unsigned char[]>(bytes + soft_nms_scratch(longest) + 64);
  unsigned char* aligned = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64;
  float *x0 = reinterpret_cast<float*>(aligned), *y0 = x0 + count, *x1 = y0 + count, *y1 = x1 + count,
        *area = y1 + count, *score = area + count, *winner_scores = score + count;
  int32_t* winners = reinterpret_cast<int32_t*>(winner_scores + count);
  void* scratch = aligned + bytes;
  for (size_t i = 0; i < count; ++i) {
    const float* box = boxes + 4 * static_cast<size_t>(index[i]);
    const float width = box[2] - box[0], height = box[3] - box[1], product = width * height;
    // false for NaN
    const bool good = width > 0 && height > 0 && product >= FLT_MIN && product <= FLT_MAX;
    x0[i] = good ? box[0] : FLT_MAX;
    y0[i] = good ? box[1] : FLT_MAX;
    x1[i] = good ? box[2] : -FLT_MAX;
    y1[i] = good ? box[3] : -FLT_MAX;
    area[i] = good ? product : 0.0f;
    score[i] = scores[index[i]];
  }

  struct Lane {
    float score;
    uint32_t index;
    size_t next, end;
  };
  std::vector<Lane> lanes;
  begin = 0;
  for (const size_t end : field.ends) {
    const size_t taken = race(x0 + begin, y0 + begin, x1 + begin, y1 + begin, area + begin, score + begin, end - begin,
                              method, iou_threshold, sigma, min_score, std::min(max_output, end - begin), scratch,
                              winners + begin, winner_scores + begin);
    for (size_t k = begin; k < begin + taken; ++k) winners[k] += static_cast<int32_t>(begin);
    lanes.push_back({winner_scores[begin], index[static_cast<size_t>(winners[begin])], begin, begin + taken});
    begin = end;
  }
  if (lanes.size() == 1) {
    const size_t taken = lanes[0].end;
    for (size_t k = 0; k < taken; ++k) kept[k] = index[static_cast<size_t>(winners[k])];
    std::copy(winner_scores, winner_scores + taken, kept_scores);
    return taken;
  }
  const auto behind = [](const Lane& a, const Lane& b) {
    return a.score != b.score ? a.score < b.score : a.index > b.index;
  };
  std::make_heap(lanes.begin(), lanes.end(), behind);
  size_t out = 0;
  while (out < most && !lanes.empty()) {
    std::pop_heap(lanes.begin(), lanes.end(), behind);
    Lane& lane = lanes.back();
    kept[out] = lane.index;
    kept_scores[out++] = lane.score;
    if (++lane.next < lane.end) {
      lane.score = winner_scores[lane.next];
      lane.index = index[static_cast<size_t>(winners[lane.next])];
      std::push_heap(lanes.begin(), lanes.end(), behind);
    } else {
      lanes.pop_back();
    }
  }
  return out;
}

}  // namespace

#define IMAGE(name, type, isa)                                                                                       \
  size_t name##_##isa(const float* boxes, const float* scores, const int64_t* classes, size_t n, int method,         \
                      int per_class, float iou_threshold, float sigma, float min_score, size_t max_output,           \
                      int64_t* kept, float* kept_scores) {                                                           \
    return suppress(soft_nms_##isa, boxes, scores, classes, n, method, per_class, iou_threshold, sigma, min_score,   \
                    max_output, kept, kept_scores);                                                                  \
  }
FOR_EACH_ISA(IMAGE, soft_nms_image, SoftNmsImage)
#undef IMAGE

}  // namespace calmclip
