
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/dither.h"
#include "../common/geometry.h"
#include "../common/norm.h"
#include "../common/norm_codes.h"
#include "../common/rectified_codec.h"
#include "codes.h"
#include "group.h"
#include "number.h"
#include "parallel.h"
#include "rotation.h"

namespace mmactnn {
namespace {

// The mean of each kind of a rotated group, with its scale.
template <bool kSplit>
void load_rotated_kinds(const void* ranges, int64_t index, Range* kinds) {
  if constexpr (kSplit) {
    const auto range =
        RotatedRange::load(static_cast<const uint16_t*>(ranges) + 3 * index);
    kinds[0] = {range.mean[0], range.scale};
    kinds[1] = {range.mean[1], range.scale};
  } else {
    kinds[0] = kinds[1] =
        Range::unpack(static_cast<const uint32_t*>(ranges)[index]);
  }
}

// Calls `body(element, channel, passed, grad, normal)` with every element of a
// row in memory order; `grad` is 0 where the gradient does not pass.
template <NormCodes kCodes, typename T, typename Body>
void for_each_element(const T* grad_output, const NormArguments& arguments,
                      int64_t row, const Body& body) {
  constexpr bool kSplit = kCodes == NormCodes::kSplit;
  const Geometry& geometry = arguments.geometry;
  const Channels& channels = arguments.channels;
  const int bits = static_cast<int>(arguments.bits);
  const int act_bits = static_cast<int>(arguments.act_bits);
  const auto row_codes = [&](const uint8_t* codes, int64_t width) {
    return codes + row * geometry.blocks_per_row() * width;
  };
  const uint8_t* codes = row_codes(arguments.codes, bits);
  const uint8_t* act_codes = nullptr;
  if constexpr (kCodes == NormCodes::kMask) {
    act_codes = row_codes(arguments.act_codes, act_bits);
  }
  constexpr int kRanges = kSplit ? 2 : 1;
  const int64_t first_group = row * geometry.groups_per_row();
  const uint32_t max_code = kSplit ? max_split_code(bits) : max_code_of(bits);
  const uint32_t passing = arguments.act_passing_bits();
  const int fraction = fraction_bits(max_code);
  const GroupDither draw(arguments.drawn, geometry);
  const RotatedDecoder rotated(arguments.drawn, geometry,
                               arguments.value_bits(), arguments.rotated());
  uint16_t random[kMaxGroup];
  uint8_t unpacked[kRotation];
  int32_t multiples[kRotation];
  const T* source = grad_output + row * geometry.row_numel;
  const int64_t channel_step = channels.last ? 1 : channels.plane;
  int64_t channel = 0, left = channel_step;
  for (int64_t start = 0; start < geometry.row_numel;
       start += geometry.group_size) {
    const int64_t end =
        std::min(start + geometry.group_size, geometry.row_numel);
    const int64_t index = first_group + start / geometry.group_size;
    Range kinds[2];
    bool dithered = false;
    if (rotated) {
      load_rotated_kinds<kSplit>(arguments.ranges, index, kinds);
      unpack_codes(codes + start / kBlock * bits, kRotation / kBlock, bits,
                   unpacked);
      rotated(index, unpacked, multiples);
    } else {
      const auto* words =
          static_cast<const uint32_t*>(arguments.ranges) + index * kRanges;
      kinds[0] = Range::unpack(words[0]);
      kinds[1] = Range::unpack(words[kRanges - 1]);
      dithered = draw({row, start, end - start}, random);
    }
    for (int64_t i = start; i < end; ++i) {
      uint32_t code = code_at(codes, i, bits);
      bool passed = true;
      Range range = kinds[0];
      if constexpr (kSplit) {
        passed = split_positive(code, bits);
        range = kinds[passed];
        code = split_value_code(code, bits);
      } else if constexpr (kCodes == NormCodes::kMask) {
        passed = (code_at(act_codes, i, act_bits) & passing) != 0u;
      }
      float normal;
      if (rotated) {
        normal = rotated_value(multiples[i - start], range.step, range.low);
      } else if (range.special()) {
        normal = decode_special(code, range, max_code);
      } else if (dithered) {
        normal = decode_dithered(code, random[i - start], range, fraction);
      } else {
        normal = decode(code, range);
      }
      const float grad = passed ? static_cast<float>(source[i]) : 0.0f;
      body(i, channel, passed, grad, normal);
      if (--left == 0) {
        left = channel_step;
        channel = channel + 1 == channels.count ? 0 : channel + 1;
      }
    }
  }
}

int64_t row_grain(const Geometry& geometry) {
  return std::max<int64_t>(
      kGrainElements / std::max<int64_t>(geometry.row_numel, 1), 1);
}

template <NormCodes kCodes>
void sum_gradients(const Memory& grad_output, const NormArguments& arguments,
                   const NormSums& sums) {
  const int64_t channels = arguments.channels.count;
  const Geometry& geometry = arguments.geometry;
  // Sums by row, so that their order depends on nothing else.
  std::vector<double> row_sums(geometry.rows * 2 * channels);
  dispatch_dtype(grad_output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(grad_output.const_data_ptr());
    T* target = static_cast<T*>(sums.grad.mutable_data_ptr());
    parallel_for(
        geometry.rows, row_grain(geometry), [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            double* totals = row_sums.data() + row * 2 * channels;
            double* products = totals + channels;
            for_each_element<kCodes>(
                source, arguments, row,
                [&](int64_t i, int64_t channel, bool passed, float value,
                    float normal) {
                  totals[channel] += value;
                  products[channel] += static_cast<double>(value) * normal;
                  if constexpr (kCodes == NormCodes::kMask) {
                    const int64_t index = row * geometry.row_numel + i;
                    target[index] = passed ? source[index] : T(0.0f);
                  }
                });
          }
        });
  });
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0, product = 0.0;
    for (int64_t row = 0; row < geometry.rows; ++row) {
      const double* totals = row_sums.data() + row * 2 * channels;
      sum += totals[c];
      product += totals[channels + c];
    }
    sums.gradients[c] = static_cast<float>(sum);
    sums.products[c] = static_cast<float>(product);
  }
}

template <NormCodes kCodes>
void gradients(const Memory& grad_output, const NormArguments& arguments,
               const NormFactors& factors, const Memory& output) {
  const Geometry& geometry = arguments.geometry;
  const float* scale = factors.scale;
  const float* means = factors.means;
  const float* product_means = means + arguments.channels.count;
  dispatch_dtype(grad_output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(grad_output.const_data_ptr());
    T* target = static_cast<T*>(output.mutable_data_ptr());
    parallel_for(
        geometry.rows, row_grain(geometry), [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            for_each_element<kCodes>(
                source, arguments, row,
                [&](int64_t i, int64_t channel, bool, float value,
                    float normal) {
                  target[row * geometry.row_numel + i] = static_cast<T>(
                      norm_grad(value, normal, means[channel],
                                product_means[channel], scale[channel]));
                });
          }
        });
  });
}

void write_factors(const NormArguments& arguments, const NormSums& sums) {
  const int64_t channels = arguments.channels.count;
  const auto count = static_cast<float>(arguments.channels.channel_numel());
  auto* factors = static_cast<float*>(sums.factors.mutable_data_ptr());
  for (int64_t c = 0; c < channels; ++c) {
    const float factor = sums.weight == nullptr ? 1.0f : sums.weight[c];
    factors[c] = multiply(sums.invstd[c], factor);
    factors[channels + c] =
        sums.use_batch_stats ? sums.gradients[c] / count : 0.0f;
    factors[2 * channels + c] =
        sums.use_batch_stats ? sums.products[c] / count : 0.0f;
  }
}

}  // namespace

namespace cpu {

void norm_grad_sums(const Memory& grad_output, const NormArguments& arguments,
                    const NormSums& sums) {
  dispatch_codes(arguments.kind, [&](auto codes) {
    sum_gradients<decltype(codes)::value>(grad_output, arguments, sums);
  });
  if (sums.factors) write_factors(arguments, sums);
}

void norm_grad_input(const Memory& grad_output, const NormArguments& arguments,
                     const NormFactors& factors, const Memory& grad_input) {
  if (arguments.kind == NormCodes::kSplit) {
    gradients<NormCodes::kSplit>(grad_output, arguments, factors, grad_input);
  } else {
    gradients<NormCodes::kPlain>(grad_output, arguments, factors, grad_input);
  }
}

}  // namespace cpu
}  // namespace mmactnn
