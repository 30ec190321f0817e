#include "quant_linear.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

namespace calmclip {

void pack_linear(const int8_t* w, size_t k, size_t n, int8_t* panels, int32_t* sums) {
  for (size_t column = 0; column < n; column += kPanel) {
    const size_t columns = n - column < kPanel ? n - column : kPanel;
    int32_t* sum = sums + column;
    std::memset(sum, 0, kPanel * sizeof *sum);
    for (size_t row = 0; row < k; row += 4, panels += 4 * kPanel) {
      const size_t rows = k - row < 4 ? k - row : 4;
      const int8_t* from = w + row * n + column;
      if (rows == 4 && columns == kPanel) {  // constant bounds let compilers vectorize the loops
        for (size_t c = 0; c < kPanel; ++c)
          for (size_t r = 0; r < 4; ++r) panels[4 * c + r] = from[r * n + c];
      } else {
        std::memset(panels, 0, 4 * kPanel);
        for (size_t c = 0; c < columns; ++c)
          for (size_t r = 0; r < rows; ++r) panels[4 * c + r] = from[r * n + c];
      }
      for (size_t r = 0; r < rows; ++r)
        for (size_t c = 0; c < columns; ++c) sum[c] += from[r * n + c];
    }
  }
}

namespace {

// The sums of the positive and of the negative weights of a step's pairs, in one form.
struct Load {
  static constexpr size_t kPairs = 2 * kOrderColumns;
  uint8_t sums[2 * kPairs];
  uint16_t step, form;
  uint8_t most;

  Load(const int8_t* w, size_t step, size_t number)
      : step(static_cast<uint16_t>(step)), form(static_cast<uint16_t>(number << kFormShift)) {
    const auto& order = kForm[number];
    w += step * 4 * kPanel;
    int16_t a[kPairs], b[kPairs], most_of[kPairs];
    for (size_t i = 0; i < kPairs; ++i) {
      a[i] = w[i / 2 * 4 + order[i % 2 * 2]];
      b[i] = w[i / 2 * 4 + order[i % 2 * 2 + 1]];
    }
    for (size_t i = 0; i < kPairs; ++i) {  // simple loops, which compilers vectorize
      const int16_t above = std::max<int16_t>(a[i], 0) + std::max<int16_t>(b[i], 0);
      const int16_t below = std::min<int16_t>(-std::min<int16_t>(a[i], 0) - std::min<int16_t>(b[i], 0), 255);
      sums[i] = static_cast<uint8_t>(above);
      sums[kPairs + i] = static_cast<uint8_t>(below);
      most_of[i] = std::max(above, below);
    }
    int16_t highest = 0;
    for (const int16_t sum : most_of) highest = std::max(highest, sum);
    most = static_cast<uint8_t>(highest);
  }

  // Both are safe.
  bool fits(const Load& other) const {
    uint8_t over = 0;
    for (size_t i = 0; i < sizeof sums; ++i) over |= sums[i] > kSafe - other.sums[i];
    return !over;
  }
};

constexpr size_t kTries = 128;
constexpr size_t kNear = 192;  // couples lie within as many steps, whose rows of x stay in the first cache

struct Order {
  std::vector<uint16_t> first_form, other_forms, single, rest;

  // The steps [first, last) of the columns that begin at w.
  void add(const int8_t* w, size_t first, size_t last) {
    std::vector<Load> loads, others;
    for (size_t step = first; step < last; ++step) loads.emplace_back(w, step, 0);
    std::vector<char> taken(last - first);
    couple(loads, first, taken, first_form);
    for (const Load& load : loads)
      if (!taken[load.step - first]) {
        others.push_back(load);
        for (size_t form = 1; form < kForms; ++form) others.emplace_back(w, load.step, form);
      }
    couple(others, first, taken, other_forms);
    for (const Load& load : others)  // of a step's safe forms the first
      if (!taken[load.step - first] && load.most <= kSafe) {
        single.push_back(load.step | load.form);
        taken[load.step - first] = 1;
      }
    for (size_t step = first; step < last; ++step)
      if (!taken[step - first]) rest.push_back(static_cast<uint16_t>(step));
  }

 private:
  // The heaviest step takes the heaviest that fits. Few steps need many tries.
  static void couple(std::vector<Load>& loads, size_t first, std::vector<char>& taken, std::vector<uint16_t>& to) {
    std::vector<Load*> heaviest;
    for (Load& load : loads)
      if (load.most <= kSafe) heaviest.push_back(&load);
    std::stable_sort(heaviest.begin(), heaviest.end(), [](const Load* a, const Load* b) { return a->most > b->most; });
    std::vector<std::array<Load*, 2>> couples;
    for (auto a = heaviest.begin(); a != heaviest.end(); ++a) {
      size_t tries = taken[(*a)->step - first] ? kTries : 0;
      for (auto b = a + 1; b != heaviest.end() && tries < kTries; ++b) {
        if (taken[(*b)->step - first] || (*b)->step == (*a)->step) continue;
        ++tries;
        if (!(*a)->fits(**b)) continue;
        taken[(*a)->step - first] = taken[(*b)->step - first] = 1;
        couples.push_back({*a, *b});
        if ((*a)->step > (*b)->step) std::swap(couples.back()[0], couples.back()[1]);
        break;
      }
    }
    const auto before = [](const auto& a, const auto& b) { return a[0]->step < b[0]->step; };
    std::sort(couples.begin(), couples.end(), before);  // the kernel's reads of x and w then advance
    for (const auto& couple : couples)
      for (const Load* load : couple) to.push_back(load->step | load->form);
  }
};

}  // namespace

void order_linear(const int8_t* panels, size_t k, size_t count, uint16_t* order) {
  const size_t steps = k / 4;
  for (size_t panel = 0; panel < count; ++panel, panels += linear_panel_bytes(k)) {
    uint16_t* const start = order;
    size_t rest = 0;
    for (size_t column = 0; column < kPanel; column += kOrderColumns) {
      Order of;
      for (size_t first = 0; first < steps; first += kNear)
        of.add(panels + 4 * column, first, std::min(first + kNear, steps));
      rest += of.rest.size();
      for (const size_t number : {of.first_form.size() / 2, of.other_forms.size() / 2, of.single.size()})
        *order++ = static_cast<uint16_t>(number);
      for (const auto* part : {&of.first_form, &of.other_forms, &of.single, &of.rest})
        order = std::copy(part->begin(), part->end(), order);
    }
    if (rest * kOrderColumns * 2 > steps * kPanel) *start = kUnordered;
  }
}

}  // namespace calmclip

// For tests and benchmarks.
extern "C" __attribute__((visibility("default"))) void calmclip_order_linear(const int8_t* panels, size_t k,
                                                                             size_t count, uint16_t* order) {
  calmclip::order_linear(panels, k, count, order);
}
