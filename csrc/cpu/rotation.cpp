#include "rotation.h"

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace mmactnn {
namespace {

// Sum of all numbers, of each block first. They are overwritten.
float tree_sum(float* numbers) {
  constexpr int kBlocks = kRotation / kBlock;
  for (int block = 0; block < kBlocks; ++block) {
    const float* of = numbers + block * kBlock;
    numbers[block] = ((of[0] + of[1]) + (of[2] + of[3])) +
                     ((of[4] + of[5]) + (of[6] + of[7]));
  }
  for (int count = kBlocks / 2; count > 0; count /= 2) {
    for (int i = 0; i < count; ++i) numbers[i] += numbers[i + count];
  }
  return numbers[0];
}

// Product with the Hadamard matrix over the bits of a place whose values are
// given, in place.
template <int... kSteps>
void multiply(int32_t* numbers) {
  for (const int step : {kSteps...}) {
    for (int start = 0; start < kRotation; start += 2 * step) {
      for (int i = start; i < start + step; ++i) {
        const int32_t a = numbers[i], b = numbers[i + step];
        numbers[i] = a + b;
        numbers[i + step] = a - b;
      }
    }
  }
}

void flip(int32_t* numbers, const bool* negative) {
  for (int i = 0; i < kRotation; ++i) {
    numbers[i] = negative[i] ? -numbers[i] : numbers[i];
  }
}

// A S B S A; `round` is called with the numbers before the last one.
template <typename Round>
void transform(int32_t* numbers, const bool* negative, const Round& round) {
  bool shifted[kRotation];
  for (int i = 0; i < kRotation; ++i) {
    shifted[i] = negative[(i + kSignShift * kBlock) % kRotation];
  }
  multiply<2, 4, 8, 16>(numbers);
  flip(numbers, shifted);
  multiply<1, 32, 64, 128>(numbers);
  round(numbers);
  flip(numbers, shifted);
  multiply<2, 4, 8, 16>(numbers);
}

void draw_signs(PairStream stream, uint64_t group, bool* negative) {
  for (int word = 0; word < kRotationWords; ++word) {
    const uint32_t signs = rotation_signs(stream, group, word);
    for (int bit = 0; bit < 32; ++bit) {
      const int block = word + bit / kBlock * kRotationWords;
      negative[block * kBlock + bit % kBlock] = (signs >> bit & 1u) != 0u;
    }
  }
}

}  // namespace

void RotatedRange::store(uint16_t* target) const {
  const float numbers[3] = {mean[0], mean[1], scale};
  for (int i = 0; i < 3; ++i) {
    target[i] = static_cast<uint16_t>(float_bits(numbers[i]) >> 16);
  }
}

RotatedRange RotatedRange::load(const uint16_t* source) {
  const auto number = [&](int i) {
    return bits_float(uint32_t{source[i]} << 16);
  };
  return {{number(0), number(1)}, number(2)};
}

RotatedRange encode_rotated(const float* values, const bool* passes,
                            Blocked blocked, PairStream stream, uint64_t group,
                            int bits, uint8_t* codes) {
  const auto kind = [&](int i) { return passes == nullptr || passes[i]; };
  const bool both = passes != nullptr && blocked == Blocked::kValue;
  float numbers[kRotation];
  RotatedRange range{};
  float count = 0.0f;
  for (int i = 0; i < kRotation; ++i) {
    const bool pass = kind(i);
    numbers[i] = pass ? values[i] : 0.0f;
    if (pass) count += 1.0f;
  }
  const float passing = tree_sum(numbers);
  range.mean[1] = kind_mean(passing, count);
  if (both) {
    std::copy(values, values + kRotation, numbers);
    range.mean[0] = kind_mean(add(tree_sum(numbers), -passing),
                              static_cast<float>(kRotation) - count);
  }
  float largest = 0.0f, poison = 0.0f;
  for (int i = 0; i < kRotation; ++i) {
    const bool pass = kind(i);
    const bool coded = pass || both;
    numbers[i] = coded ? add(values[i], -range.mean[pass]) : 0.0f;
    largest = std::max(largest, std::fabs(numbers[i]));
    poison += numbers[i] * 0.0f;  // NaN as soon as one rest is not finite
  }
  const bool finite = !is_nan(poison);
  const RotationUnit unit(largest);
  bool negative[kRotation];
  draw_signs(stream, group, negative);
  const float offset = rotation_offset(draw_pair(stream, group, true));
  int32_t integers[kRotation];
  int32_t energy = 0, product = 0;
  for (int i = 0; i < kRotation; ++i) {
    // To the nearest, to even in a tie, as the last bits of a float.
    constexpr float kWhole = 0x1.8p23f;
    const float scaled =
        finite ? add(multiply(numbers[i], unit.factor()), offset) : 0.0f;
    const auto v = static_cast<int32_t>(add(add(scaled, kWhole), -kWhole));
    energy += v * v;
    integers[i] = v;
  }
  flip(integers, negative);
  transform(integers, negative, [](int32_t* numbers) {
    // As float16 numbers.
    for (int i = 0; i < kRotation; ++i) {
      const c10::Half rounded(static_cast<float>(numbers[i]));
      numbers[i] = static_cast<int32_t>(static_cast<float>(rounded));
    }
  });
  const float factor = rotation_factor(static_cast<float>(energy), bits);
  for (int i = 0; i < kRotation; ++i) {
    const uint32_t code = float_bits(rotation_code(
                              static_cast<float>(integers[i]), factor, bits)) -
                          kIntegerFloat;
    codes[i] = static_cast<uint8_t>(code);
    product += integers[i] * rotation_level(code, bits);
  }
  range.scale =
      finite ? rotation_scale(static_cast<float>(energy),
                              static_cast<float>(product), unit.inverse())
             : bits_float(0x7FC00000u);
  return range;
}

void decode_rotated(const uint8_t* codes, PairStream stream, uint64_t group,
                    int bits, int32_t* multiples) {
  for (int i = 0; i < kRotation; ++i) {
    multiples[i] = rotation_level(codes[i] & max_code_of(bits), bits);
  }
  bool negative[kRotation];
  draw_signs(stream, group, negative);
  transform(multiples, negative, [](int32_t*) {});
  flip(multiples, negative);
}

}  // namespace mmactnn
