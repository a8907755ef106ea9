#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "../common/norm_act.h"
#include "codes.h"
#include "group.h"
#include "number.h"

namespace mmactnn {
namespace {

// Of the elements of a group that are of one kind.
Extent kind_extent(const float* values, const uint8_t* kinds, uint8_t kind,
                   int64_t count) {
  Extent extent{FLT_MAX, -FLT_MAX, true};
  for (int64_t i = 0; i < count; ++i) {
    if (kinds[i] != kind) continue;
    if (is_finite(values[i])) {
      extent.low = std::min(extent.low, values[i]);
      extent.high = std::max(extent.high, values[i]);
    } else {
      extent.all_finite = false;
    }
  }
  return extent;
}

// One group on its way through the normalisation.
struct GroupValues {
  float normal[kMaxGroup];
  float output[kMaxGroup];
  uint8_t kinds[kMaxGroup];  // 1 where the output is positive
  uint16_t random[kMaxGroup];
  uint8_t codes[kMaxGroup];
};

template <typename T>
void normalise(const T* input, const T* residual, T* output,
               const NormActArguments& arguments, const Group& group,
               GroupValues& values) {
  const Channels& channels = arguments.channels;
  const int64_t first = group.row * channels.row_numel() + group.start;
  for (int64_t i = 0; i < group.count; ++i) {
    const int64_t element = group.start + i;
    const ChannelValues channel =
        channel_values(arguments, channels.last ? element % channels.count
                                                : element / channels.plane);
    const float normal =
        channel.normalise(static_cast<float>(input[first + i]));
    float total = channel.scale(normal);
    if (residual != nullptr) {
      total = add(total, static_cast<float>(residual[first + i]));
    }
    T result = static_cast<T>(total);
    values.kinds[i] = is_positive(static_cast<float>(result)) ? 1 : 0;
    if (arguments.mode != NormAct::kPlain && values.kinds[i] == 0) {
      result = static_cast<T>(0.0f);
    }
    output[first + i] = result;
    values.normal[i] = normal;
    values.output[i] = static_cast<float>(result);
  }
}

void draw(PhiloxStream stream, const Geometry& geometry, const Group& group,
          GroupValues& values) {
  const int64_t block =
      group.row * geometry.blocks_per_row() + group.start / kBlock;
  random_bits(stream, static_cast<uint64_t>(block),
              (group.count + kBlock - 1) / kBlock, values.random);
}

uint32_t encode_any(float value, Range range, float scale, uint16_t random,
                    uint32_t max_code) {
  return range.special() ? encode_special(value, range, max_code)
                         : encode(value, range, scale, random, max_code);
}

void write(const Geometry& geometry, const Group& group, int bits,
           GroupValues& values, uint8_t* codes) {
  const int64_t blocks = (group.count + kBlock - 1) / kBlock;
  std::fill(values.codes + group.count, values.codes + blocks * kBlock,
            uint8_t{0});
  const int64_t block =
      group.row * geometry.blocks_per_row() + group.start / kBlock;
  dispatch_bits(bits, [&](auto width) {
    pack_codes<decltype(width)::value>(values.codes, blocks,
                                       codes + block * bits);
  });
}

void write_plain(const NormActArguments& arguments, const Group& group,
                 int64_t index, GroupValues& values, uint8_t* codes,
                 uint32_t* ranges) {
  const uint32_t max_code = max_code_of(arguments.bits);
  const Range range =
      make_range(find_extent(values.normal, group.count), max_code);
  const float scale = encode_scale(range);
  ranges[index] = range.pack();
  draw(arguments.stream, arguments.geometry, group, values);
  for (int64_t i = 0; i < group.count; ++i) {
    values.codes[i] = static_cast<uint8_t>(
        encode_any(values.normal[i], range, scale, values.random[i], max_code));
  }
  write(arguments.geometry, group, arguments.bits, values, codes);
}

void write_split(const NormActArguments& arguments, const Group& group,
                 int64_t index, GroupValues& values, uint8_t* codes,
                 uint32_t* ranges) {
  const int bits = arguments.bits;
  const uint32_t max_code = max_split_code(bits);
  Range range[2];
  float scale[2];
  for (uint8_t kind = 0; kind < 2; ++kind) {
    range[kind] = make_kind_range(
        kind_extent(values.normal, values.kinds, kind, group.count), max_code);
    scale[kind] = encode_scale(range[kind]);
    ranges[2 * index + kind] = range[kind].pack();
  }
  draw(arguments.stream, arguments.geometry, group, values);
  for (int64_t i = 0; i < group.count; ++i) {
    const uint8_t kind = values.kinds[i];
    const uint32_t code = encode_any(values.normal[i], range[kind], scale[kind],
                                     values.random[i], max_code);
    values.codes[i] = static_cast<uint8_t>(join_split(code, kind == 1, bits));
  }
  write(arguments.geometry, group, bits, values, codes);
}

void write_zeroed(const NormActArguments& arguments, const Group& group,
                  int64_t index, GroupValues& values, uint8_t* codes,
                  uint32_t* ranges) {
  const uint32_t max_code = max_zeroed_code(arguments.act_bits);
  const Range range = make_kind_range(
      kind_extent(values.output, values.kinds, 1, group.count), max_code);
  const float scale = encode_scale(range);
  ranges[index] = range.pack();
  draw(arguments.act_stream, arguments.geometry, group, values);
  for (int64_t i = 0; i < group.count; ++i) {
    uint32_t code = 0;
    if (values.kinds[i] == 1) {
      code =
          1 + (range.special() ? encode_zeroed_special(values.output[i], range)
                               : encode(values.output[i], range, scale,
                                        values.random[i], max_code));
    }
    values.codes[i] = static_cast<uint8_t>(code);
  }
  write(arguments.geometry, group, arguments.act_bits, values, codes);
}

// `target` may be `input`.
NormActOutputs run(const Tensor& input, const std::optional<Tensor>& residual,
                   Tensor& target, const NormActArguments& arguments) {
  NormActOutputs outputs = empty_norm_act(input, arguments);
  auto* codes = static_cast<uint8_t*>(outputs.codes.mutable_data_ptr());
  auto* ranges = static_cast<uint32_t*>(outputs.ranges.mutable_data_ptr());
  auto* act_codes = static_cast<uint8_t*>(outputs.act_codes.mutable_data_ptr());
  auto* act_ranges =
      static_cast<uint32_t*>(outputs.act_ranges.mutable_data_ptr());
  const Geometry& geometry = arguments.geometry;
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    const T* added =
        residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr;
    T* output = static_cast<T*>(target.mutable_data_ptr());
    torch::stable::parallel_for(
        0, input.numel() == 0 ? 0 : geometry.groups(),
        kGrainElements / geometry.group_size, [&](int64_t begin, int64_t end) {
          GroupValues values;
          for (int64_t index = begin; index < end; ++index) {
            const Group group = locate(geometry, index);
            normalise(source, added, output, arguments, group, values);
            if (arguments.mode == NormAct::kRelu) {
              write_split(arguments, group, index, values, codes, ranges);
              continue;
            }
            write_plain(arguments, group, index, values, codes, ranges);
            if (arguments.mode == NormAct::kAdd) {
              write_zeroed(arguments, group, index, values, act_codes,
                           act_ranges);
            }
          }
        });
  });
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_act(
    Tensor input, std::optional<Tensor> residual, Tensor mean, Tensor invstd,
    std::optional<Tensor> weight, std::optional<Tensor> bias, bool relu,
    int64_t bits, int64_t act_bits, int64_t group_size, int64_t seed,
    int64_t offset) {
  const NormActArguments arguments =
      check_norm_act(input, residual, mean, invstd, weight, bias, relu, bits,
                     act_bits, group_size, seed, offset);
  Tensor output = torch::stable::empty_like(input);
  NormActOutputs kept = run(input, residual, output, arguments);
  return {output, kept.codes, kept.ranges, kept.act_codes, kept.act_ranges};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_(
    Tensor input, std::optional<Tensor> residual, Tensor mean, Tensor invstd,
    std::optional<Tensor> weight, std::optional<Tensor> bias, bool relu,
    int64_t bits, int64_t act_bits, int64_t group_size, int64_t seed,
    int64_t offset) {
  const NormActArguments arguments =
      check_norm_act(input, residual, mean, invstd, weight, bias, relu, bits,
                     act_bits, group_size, seed, offset);
  NormActOutputs kept = run(input, residual, input, arguments);
  return {kept.codes, kept.ranges, kept.act_codes, kept.act_ranges};
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&mmactnn::norm_act));
  m.impl("norm_act_", TORCH_BOX(&mmactnn::norm_act_));
}
