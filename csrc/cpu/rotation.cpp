#include "rotation.h"

#include <cstdint>

namespace mmactnn {
namespace {

// Sum of all numbers, pairs of neighbours first. They are overwritten.
float tree_sum(float* numbers) {
  for (int count = kRotation / 2; count > 0; count /= 2) {
    for (int i = 0; i < count; ++i) {
      numbers[i] = numbers[2 * i] + numbers[2 * i + 1];
    }
  }
  return numbers[0];
}

// Product with the Hadamard matrix, in place.
template <typename Number>
void transform(Number* numbers) {
  for (int step = 1; step < kRotation; step *= 2) {
    for (int start = 0; start < kRotation; start += 2 * step) {
      for (int i = start; i < start + step; ++i) {
        const Number a = numbers[i], b = numbers[i + step];
        numbers[i] = a + b;
        numbers[i + step] = a - b;
      }
    }
  }
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
  float numbers[kRotation], coefficients[kRotation];
  RotatedRange range{};
  for (const bool pass : {false, true}) {
    if (!pass && (passes == nullptr || blocked == Blocked::kNothing)) continue;
    float count = 0.0f;
    for (int i = 0; i < kRotation; ++i) {
      const bool own = kind(i) == pass;
      numbers[i] = own ? values[i] : 0.0f;
      if (own) count += 1.0f;
    }
    range.mean[pass] = kind_mean(tree_sum(numbers), count);
  }
  bool negative[kRotation];
  draw_signs(stream, group, negative);
  for (int i = 0; i < kRotation; ++i) {
    const bool pass = kind(i);
    const bool coded = pass || blocked == Blocked::kValue;
    const float rest = coded ? add(values[i], -range.mean[pass]) : 0.0f;
    numbers[i] = multiply(rest, rest);
    coefficients[i] = negative[i] ? -rest : rest;
  }
  const float energy = tree_sum(numbers);
  const float factor = rotation_factor(energy, bits);
  transform(coefficients);
  for (int i = 0; i < kRotation; ++i) {
    const uint32_t code = rotation_code(coefficients[i], factor, bits);
    codes[i] = static_cast<uint8_t>(code);
    numbers[i] = multiply(coefficients[i],
                          static_cast<float>(rotation_level(code, bits)));
  }
  range.scale = rotation_scale(energy, tree_sum(numbers));
  return range;
}

void decode_rotated(const uint8_t* codes, PairStream stream, uint64_t group,
                    int bits, int32_t* multiples) {
  for (int i = 0; i < kRotation; ++i) {
    multiples[i] = rotation_level(codes[i] & max_code_of(bits), bits);
  }
  transform(multiples);
  bool negative[kRotation];
  draw_signs(stream, group, negative);
  for (int i = 0; i < kRotation; ++i) {
    multiples[i] = negative[i] ? -multiples[i] : multiples[i];
  }
}

}  // namespace mmactnn
