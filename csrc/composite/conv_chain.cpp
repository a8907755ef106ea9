// Convolutions, each with what follows it, one behind another: one call of an
// op for all of them, because each call, and what a caller does between two,
// takes longer than the kernels for small tensors. Made of other ops, which run
// on any device that has them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/allocate.h"
#include "../common/call.h"
#include "../common/tensor_checks.h"

namespace mmactnn {
namespace {

using OptionalTensors = std::vector<std::optional<Tensor>>;
using Integers = std::vector<int64_t>;

// Of the lists of tensors that come with each link.
constexpr size_t kParameters = 4;  // weight, bias; scale and shift
constexpr size_t kBuffers = 3;   // running mean and variance, count of batches
constexpr size_t kSettings = 2;  // momentum, eps

// What follows a convolution; these numbers are in the schema's `plan`.
enum class Follows : int64_t {
  kNothing = 0,   // of the last one only
  kReLU = 1,      // kept as zeroed codes
  kNorm = 2,      // kept as plain codes
  kNormReLU = 3,  // kept as split codes, after an addition as plain and zeroed
};

// How the input of the first convolution is kept; in the schema's
// `input_format`.
enum class Kept : int64_t { kPlain = 0, kRows = 1, kSplit = 2, kZeroed = 3 };

// Reads integers one by one.
class Reader {
 public:
  Reader(const char* name, const Integers& integers)
      : name_(name), integers_(integers) {}

  bool at_end() const { return place_ == integers_.size(); }

  int64_t next() {
    check(1);
    return integers_[place_++];
  }
  Integers next(int64_t count) {
    check(count);
    const auto begin = integers_.begin() + static_cast<int64_t>(place_);
    place_ += static_cast<size_t>(count);
    return {begin, begin + count};
  }

 private:
  void check(int64_t count) const {
    STD_TORCH_CHECK(
        count >= 0 && place_ + static_cast<size_t>(count) <= integers_.size(),
        name_, " is shorter than what it describes");
  }

  const char* name_;
  const Integers& integers_;
  size_t place_ = 0;
};

// One convolution and what follows it.
struct Link {
  Integers stride;
  Integers padding;
  Integers dilation;
  Integers output_padding;
  int64_t groups;
  Follows follows;
  bool of_batch;
  int64_t bits;
  int64_t act_bits;
  int64_t group_size;

  bool has_norm() const {
    return follows == Follows::kNorm || follows == Follows::kNormReLU;
  }
};

std::vector<Link> read_plan(const Integers& plan) {
  Reader reader("plan", plan);
  std::vector<Link> links;
  while (!reader.at_end()) {
    const int64_t dims = reader.next();
    Link link;
    link.stride = reader.next(dims);
    link.padding = reader.next(dims);
    link.dilation = reader.next(dims);
    link.output_padding = Integers(static_cast<size_t>(dims), 0);
    link.groups = reader.next();
    link.follows = static_cast<Follows>(reader.next());
    link.of_batch = reader.next() != 0;
    link.bits = reader.next();
    link.act_bits = reader.next();
    link.group_size = reader.next();
    links.push_back(std::move(link));
  }
  return links;
}

// Sizes and strides of a tensor.
struct Layout {
  Integers sizes;
  Integers strides;
};

void append_layout(Integers& layouts, const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  layouts.push_back(tensor.dim());
  layouts.insert(layouts.end(), sizes.begin(), sizes.end());
  layouts.insert(layouts.end(), strides.begin(), strides.end());
}

std::vector<Layout> read_layouts(const Integers& layouts) {
  Reader reader("layouts", layouts);
  std::vector<Layout> result;
  while (!reader.at_end()) {
    const int64_t dims = reader.next();
    Integers sizes = reader.next(dims);
    result.push_back({std::move(sizes), reader.next(dims)});
  }
  return result;
}

// A tensor of these strides; a copy only if they differ.
Tensor with_strides(const Tensor& tensor, const Integers& strides) {
  const auto sizes = tensor.sizes();
  const auto own = tensor.strides();
  bool same = true;
  for (size_t d = 0; d < strides.size(); ++d) {
    same = same && (own[d] == strides[d] || sizes[d] == 1);
  }
  if (same) return tensor;
  Tensor copy = empty_strided(tensor, sizes, strides, tensor.scalar_type());
  torch::stable::copy_(copy, tensor);
  return copy;
}

std::vector<Link> checked_links(const Integers& plan,
                                const OptionalTensors& parameters) {
  std::vector<Link> links = read_plan(plan);
  STD_TORCH_CHECK(
      !links.empty() && parameters.size() == links.size() * kParameters,
      "parameters must be ", kParameters, " for each of ", links.size(),
      " convolutions, got ", parameters.size());
  return links;
}

std::tuple<Tensor, std::vector<Tensor>, Integers> conv_chain(
    Tensor input, std::optional<Tensor> residual, OptionalTensors parameters,
    OptionalTensors buffers, Integers plan, std::vector<double> settings,
    int64_t seed, int64_t offset) {
  const std::vector<Link> links = checked_links(plan, parameters);
  STD_TORCH_CHECK(buffers.size() == links.size() * kBuffers &&
                      settings.size() == links.size() * kSettings,
                  "buffers and settings must be ", kBuffers, " and ", kSettings,
                  " for each of ", links.size(), " convolutions, got ",
                  buffers.size(), " and ", settings.size());
  STD_TORCH_CHECK(!residual || links.back().follows == Follows::kNormReLU,
                  "a residual must be followed by a ReLU");
  const std::optional<Tensor> none;
  std::vector<Tensor> kept;
  Integers layouts;
  append_layout(layouts, input);
  Tensor output = input;
  for (size_t i = 0; i < links.size(); ++i) {
    const Link& link = links[i];
    const auto* parameter = &parameters[i * kParameters];
    STD_TORCH_CHECK(parameter[0], "a convolution must have a weight");
    std::tie(output) = call<Tensor>(
        "aten::convolution", output, *parameter[0], parameter[1],
        Sizes(link.stride), Sizes(link.padding), Sizes(link.dilation), false,
        Sizes(link.output_padding), link.groups);
    append_layout(layouts, output);
    const int64_t draw = offset + static_cast<int64_t>(i);
    if (link.has_norm()) {
      const auto* buffer = &buffers[i * kBuffers];
      std::optional<Tensor> added;
      if (residual && i + 1 == links.size()) {
        const auto strides = output.strides();
        added = with_strides(*residual, {strides.begin(), strides.end()});
      }
      const auto [codes] = call<std::vector<Tensor>>(
          "mmactnn::batch_norm_act_", output, added, parameter[2], parameter[3],
          buffer[0], buffer[1], buffer[2], link.of_batch,
          settings[i * kSettings], settings[i * kSettings + 1],
          link.follows == Follows::kNormReLU, link.bits, link.act_bits,
          link.group_size, seed, draw, none);
      kept.insert(kept.end(), codes.begin(), codes.end());
    } else if (link.follows == Follows::kReLU) {
      const auto [codes, ranges] =
          call<Tensor, Tensor>("mmactnn::relu_codes_", output, link.bits,
                               link.group_size, seed, draw, none);
      kept.push_back(codes);
      kept.push_back(ranges);
    }
  }
  return {output, kept, layouts};
}

// Decodes the input of the first convolution.
Tensor decode(const OptionalTensors& codes, const Integers& format,
              const Layout& layout, ScalarType dtype) {
  Reader reader("input_format", format);
  const auto kind = static_cast<Kept>(reader.next());
  const int64_t bits = reader.next();
  const int64_t group_size = reader.next();
  const Sizes sizes(layout.sizes), strides(layout.strides);
  STD_TORCH_CHECK(
      codes.size() >= 2 && codes[0] && codes[1] &&
          (kind == Kept::kPlain || kind == Kept::kZeroed || codes.size() == 4),
      "input_codes must be codes, ranges and what belongs to them");
  switch (kind) {
    case Kept::kPlain:
      return std::get<0>(call<Tensor>("mmactnn::dequantize", *codes[0],
                                      *codes[1], sizes, strides, dtype, bits,
                                      group_size));
    case Kept::kRows:
      return std::get<0>(call<Tensor>("mmactnn::dequantize_rows", *codes[0],
                                      *codes[1], *codes[2], *codes[3], sizes,
                                      strides, dtype, group_size));
    case Kept::kSplit:
      return std::get<0>(call<Tensor>("mmactnn::dequantize_split", *codes[0],
                                      *codes[1], codes[2], codes[3], sizes,
                                      strides, dtype, bits, group_size));
    case Kept::kZeroed:
      return std::get<0>(call<Tensor>("mmactnn::dequantize_zeroed", *codes[0],
                                      *codes[1], sizes, strides, dtype, bits,
                                      group_size));
  }
  STD_TORCH_CHECK(false, "input_format must begin with 0 to 3, got ",
                  format[0]);
}

// Gradients that come before those of parameters: of the input, the residual
// and what the first convolution returned.
constexpr size_t kOthers = 3;

// Where the tensors begin that are kept of what follows each convolution.
std::vector<size_t> locate_kept(const std::vector<Link>& links,
                                bool has_residual, size_t count) {
  std::vector<size_t> begins;
  size_t place = 0;
  for (const Link& link : links) {
    begins.push_back(place);
    if (link.follows != Follows::kNothing) place += link.has_norm() ? 3 : 2;
  }
  if (has_residual) place += 2;
  STD_TORCH_CHECK(place == count, "kept must be ", place, " tensors, got ",
                  count);
  return begins;
}

// Decodes what followed a convolution, from what is kept of it.
Tensor decode_output(const Link& link, const Tensor* kept,
                     const std::optional<Tensor>* parameters,
                     const Layout& layout, ScalarType dtype) {
  const Sizes sizes(layout.sizes), strides(layout.strides);
  if (link.follows == Follows::kReLU) {
    return std::get<0>(call<Tensor>("mmactnn::dequantize_zeroed", kept[0],
                                    kept[1], sizes, strides, dtype, link.bits,
                                    link.group_size));
  }
  STD_TORCH_CHECK(link.follows == Follows::kNormReLU,
                  "only the last convolution may have no ReLU behind it");
  return std::get<0>(call<Tensor>("mmactnn::dequantize_split", kept[1], kept[2],
                                  parameters[2], parameters[3], sizes, strides,
                                  dtype, link.bits, link.group_size));
}

OptionalTensors conv_chain_backward(
    Tensor grad_output, OptionalTensors input_codes, Integers input_format,
    OptionalTensors parameters, std::vector<Tensor> kept, Integers layouts,
    Integers plan, Integers needs, bool needs_input, bool has_residual,
    bool observed, ScalarType dtype) {
  const std::vector<Link> links = checked_links(plan, parameters);
  const std::vector<Layout> layout = read_layouts(layouts);
  STD_TORCH_CHECK(
      needs.size() == parameters.size() && layout.size() == links.size() + 1,
      "needs must have an entry for each of the parameters, and layouts one "
      "for each convolution and the input");
  OptionalTensors grads(kOthers + parameters.size());
  // Parameters that want a gradient, before the current ones.
  int64_t wanted_before = std::count(needs.begin(), needs.end(), 1);
  const std::vector<size_t> begins =
      locate_kept(links, has_residual, kept.size());
  Tensor grad = grad_output;
  for (size_t i = links.size(); i-- > 0;) {
    const Link& link = links[i];
    const bool adds = has_residual && i + 1 == links.size();
    const size_t first = i * kParameters;
    const auto* parameter = &parameters[first];
    const int64_t* need = &needs[first];
    auto* grad_of = &grads[kOthers + first];
    const Tensor* own = kept.data() + begins[i];
    wanted_before -= std::count(need, need + kParameters, 1);
    const bool before = needs_input || wanted_before > 0;
    const bool needs_conv = before || need[0] != 0 || need[1] != 0;
    if (link.follows != Follows::kNothing) {
      grad = with_strides(grad, layout[i + 1].strides);
    }
    if (link.has_norm()) {
      std::optional<Tensor> act_codes;
      if (adds) act_codes = own[3];
      const auto [results] = call<std::vector<Tensor>>(
          "mmactnn::batch_norm_act_backward", grad, own[1], own[2], act_codes,
          parameter[2], own[0], link.follows == Follows::kNormReLU,
          link.of_batch, needs_conv, link.bits, link.act_bits, link.group_size);
      if (need[2] != 0) grad_of[2] = torch::stable::select(results[0], 0, 1);
      if (need[3] != 0) grad_of[3] = torch::stable::select(results[0], 0, 0);
      if (adds) grads[1] = results.back();
      if (needs_conv) grad = results[1];
    } else if (link.follows == Follows::kReLU) {
      std::tie(grad) =
          call<Tensor>("mmactnn::relu_codes_backward", grad, own[0], link.bits);
    }
    if (!needs_conv) break;
    Tensor x;
    if (i == 0) {
      if (observed) grads[2] = grad;
      x = decode(input_codes, input_format, layout[0], dtype);
    } else {
      x = decode_output(links[i - 1], kept.data() + begins[i - 1],
                        &parameters[first - kParameters], layout[i], dtype);
    }
    const int64_t channels = grad.size(1);
    std::optional<Sizes> bias_sizes;
    if (need[1] != 0) bias_sizes = Sizes(&channels, 1);
    const std::array<bool, 3> wanted{before, need[0] != 0, need[1] != 0};
    std::array<Tensor, 3> results;
    std::tie(results[0], results[1], results[2]) = call<Tensor, Tensor, Tensor>(
        "aten::convolution_backward", grad, x, *parameter[0], bias_sizes,
        Sizes(link.stride), Sizes(link.padding), Sizes(link.dilation), false,
        Sizes(link.output_padding), link.groups,
        torch::headeronly::HeaderOnlyArrayRef<bool>(wanted.data(), 3));
    if (need[0] != 0) grad_of[0] = results[1];
    if (need[1] != 0) grad_of[1] = results[2];
    if (!before) break;
    grad = results[0];
    if (i == 0) grads[0] = grad;
  }
  return grads;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CompositeExplicitAutograd, m) {
  m.impl("conv_chain", TORCH_BOX(&mmactnn::conv_chain));
  m.impl("conv_chain_backward", TORCH_BOX(&mmactnn::conv_chain_backward));
}
