// Convolutions, each with what follows it, that read one another's output: one
// call of an op for all of them, because each call, and what a caller does
// between two, takes longer than the kernels for small tensors. Made of other
// ops, which run on any device that has them.
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

#include "../ops/allocate.h"
#include "../ops/call.h"
#include "../ops/registration.h"
#include "kept_input.h"
#include "plan.h"

namespace mmactnn {
namespace {

using OptionalTensors = std::vector<std::optional<Tensor>>;
using Integers = std::vector<int64_t>;

// Of the lists of tensors that come with each layer.
constexpr size_t kParameters = 4;  // weight, bias; scale and shift
constexpr size_t kBuffers = 3;  // running mean and variance, count of batches

// Of the output, of any convolution.
constexpr std::array<int64_t, kMaxDims> kNoPadding{};

// Bytes of the input of a convolution from which on its two gradients are
// computed one after the other: a call more, which is short beside the kernels
// for tensors of this size, and the input need not live beside its gradient.
// mmactnn/autograd/conv.py does so for single layers, and from a lower size on:
// a chain is there to spare the host calls.
constexpr int64_t kLarge = int64_t{48} << 20;

// A tensor of these strides; a copy only if they differ.
Tensor with_strides(const Tensor& tensor, Sizes strides) {
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

// While it lives, the calls within an op record nothing: its gradients are
// those of an op of their own.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) {
    aoti_torch_grad_mode_set_enabled(false);
  }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }

 private:
  bool before_;
};

// How many layers the parameters are of.
size_t count_layers(const OptionalTensors& parameters) {
  const size_t layers = parameters.size() / kParameters;
  STD_TORCH_CHECK(parameters.size() == layers * kParameters,
                  "parameters must be ", kParameters,
                  " for each convolution, got ", parameters.size());
  for (size_t layer = 0; layer < layers; ++layer) {
    STD_TORCH_CHECK(parameters[layer * kParameters],
                    "a convolution must have a weight");
  }
  return layers;
}

class Forward {
 public:
  Forward(const std::vector<Tensor>& inputs, const OptionalTensors& parameters,
          const OptionalTensors& buffers, const Integers& plan,
          const std::vector<double>& settings, const Integers& formats,
          int64_t seed, int64_t offset)
      : inputs_(inputs),
        parameters_(parameters),
        buffers_(buffers),
        plan_(plan, inputs.size(), count_layers(parameters)),
        formats_(read_formats(formats, inputs.size())),
        seed_(seed),
        draw_(offset),
        codes_(inputs.size()) {
    const size_t layers = count_layers(parameters);
    STD_TORCH_CHECK(buffers.size() == layers * kBuffers, "buffers must be ",
                    kBuffers, " for each of ", layers, " convolutions, got ",
                    buffers.size());
    Reader<double> reader("settings", settings);
    for (size_t layer = 0; layer < layers; ++layer) {
      const double momentum = reader.next();
      settings_.emplace_back(momentum, reader.next());
    }
    for (const Tensor& input : inputs) append_layout(layouts_, input);
  }

  void run() {
    const auto& links = plan_.links();
    std::vector<int64_t> readers;
    for (const Link& link : links) readers.push_back(link.readers);
    outputs_.resize(links.size());
    // What nobody is going to read any more need not live on.
    const auto release = [&](const Source& source) {
      if (source.is_input()) return;
      const size_t i = source.index();
      if (--readers[i] == 0) outputs_[i].reset();
    };
    for (size_t i = 0; i < links.size(); ++i) {
      const Link& link = links[i];
      if (link.source.is_input()) encode_input(link.source.index());
      const Tensor output = convolve(link);
      append_layout(layouts_, output);
      if (link.has_norm()) {
        normalise(link, output);
      } else if (link.follows == Follows::kReLU) {
        const auto [codes, ranges] =
            call<Tensor, Tensor>("mmactnn::relu_codes_", output, link.bits,
                                 link.group_size, seed_, draw_++, kNone);
        kept_.push_back(codes);
        kept_.push_back(ranges);
      }
      outputs_[i] = output;
      release(link.source);
      if (link.added) release(*link.added);
    }
  }

  std::vector<Tensor> outputs() const {
    std::vector<Tensor> result;
    for (const auto& output : outputs_) {
      if (output) result.push_back(*output);
    }
    return result;
  }
  // Input by input.
  std::vector<Tensor> codes() const {
    std::vector<Tensor> result;
    for (const auto& codes : codes_) {
      result.insert(result.end(), codes.begin(), codes.end());
    }
    return result;
  }
  const std::vector<Tensor>& kept() const { return kept_; }
  const Integers& layouts() const { return layouts_; }

 private:
  const Tensor& read(const Source& source) const {
    const size_t index = source.index();
    return source.is_input() ? inputs_[index] : *outputs_[index];
  }

  // Unless somebody has done so, for this chain or another layer.
  void encode_input(size_t n) {
    if (formats_[n].kind == Kept::kNothing || !codes_[n].empty()) return;
    codes_[n] = encode(inputs_[n], formats_[n], seed_, draw_++);
  }

  Tensor convolve(const Link& link) const {
    const auto* parameter = &parameters_[link.layer * kParameters];
    return std::get<0>(call<Tensor>(
        "aten::convolution", read(link.source), *parameter[0], parameter[1],
        link.stride, link.padding, link.dilation, false,
        Sizes(kNoPadding.data(), link.stride.size()), link.groups));
  }

  void normalise(const Link& link, const Tensor& x) {
    const auto* parameter = &parameters_[link.layer * kParameters];
    const auto* buffer = &buffers_[link.layer * kBuffers];
    const auto [momentum, eps] = settings_[link.layer];
    std::optional<Tensor> added;
    if (link.added) added = with_strides(read(*link.added), x.strides());
    const auto [invstd, codes, ranges, act_codes, act_ranges] =
        call<Tensor, Tensor, Tensor, Tensor, Tensor>(
            "mmactnn::batch_norm_act_", x, added, parameter[2], parameter[3],
            buffer[0], buffer[1], buffer[2], link.of_batch, momentum, eps,
            link.follows == Follows::kNormReLU, link.bits, link.act_bits,
            link.group_size, seed_, draw_++, kNone);
    kept_.insert(kept_.end(), {invstd, codes, ranges});
    if (link.added) kept_.insert(kept_.end(), {act_codes, act_ranges});
  }

  inline static const std::optional<Tensor> kNone;

  const std::vector<Tensor>& inputs_;
  const OptionalTensors& parameters_;
  const OptionalTensors& buffers_;
  const Plan plan_;
  const std::vector<Format> formats_;
  std::vector<std::pair<double, double>> settings_;
  const int64_t seed_;
  int64_t draw_;
  OptionalTensors outputs_;                 // of links
  std::vector<std::vector<Tensor>> codes_;  // of inputs
  std::vector<Tensor> kept_;
  Integers layouts_;
};

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
           Tensor>
conv_chain(std::vector<Tensor> inputs, OptionalTensors parameters,
           OptionalTensors buffers, Integers plan, std::vector<double> settings,
           Integers formats, int64_t seed, int64_t offset) {
  const NoGrad no_grad;
  Forward forward(inputs, parameters, buffers, plan, settings, formats, seed,
                  offset);
  forward.run();
  return {forward.outputs(), forward.codes(), forward.kept(),
          on_host(forward.layouts())};
}

// Adds to a sum that may be empty yet; `wide` ones are of float32 from the
// second part on. The stable API has no addition.
void accumulate(std::optional<Tensor>& total, const Tensor& part, bool wide) {
  if (!total) {
    total = part;
    return;
  }
  if (wide && total->scalar_type() != ScalarType::Float) {
    total = torch::stable::to(*total, ScalarType::Float);
  }
  total = torch::stable::subtract(*total, part, -1.0);
}

class Backward {
 public:
  Backward(const OptionalTensors& codes, const Integers& formats,
           const OptionalTensors& parameters, const std::vector<Tensor>& kept,
           const Integers& layouts, const Integers& plan, const Integers& needs,
           const Integers& needs_inputs, bool wide, bool observed,
           ScalarType dtype)
      : grad_inputs(needs_inputs.size()),
        grads(parameters.size()),
        codes_(codes),
        formats_(read_formats(formats, needs_inputs.size())),
        parameters_(parameters),
        kept_(kept),
        layouts_(read_layouts(layouts)),
        plan_(plan, needs_inputs.size(), count_layers(parameters)),
        needs_(needs),
        needs_inputs_(needs_inputs),
        wide_(wide),
        observed_(observed),
        dtype_(dtype) {
    const size_t links = plan_.links().size();
    STD_TORCH_CHECK(needs.size() == parameters.size() &&
                        layouts_.size() == grad_inputs.size() + links,
                    "needs must have an entry for each of the parameters, and "
                    "layouts one for each input and convolution");
    size_t count = 0;
    for (const Format& format : formats_) {
      first_code_.push_back(count);
      count += format.kept();
    }
    STD_TORCH_CHECK(count == codes.size(), "codes must be ", count,
                    " tensors, got ", codes.size());
    count = 0;
    for (const Link& link : plan_.links()) {
      first_kept_.push_back(count);
      count += link.kept();
      wanted_.push_back(is_wanted(link.source) ||
                        (link.added && is_wanted(*link.added)) ||
                        wants_any(link.layer));
    }
    STD_TORCH_CHECK(count == kept.size(), "kept must be ", count,
                    " tensors, got ", kept.size());
  }

  void run(const OptionalTensors& grad_outputs) {
    const auto& links = plan_.links();
    grad_links_.resize(links.size());
    size_t end = 0;
    for (size_t i = 0; i < links.size(); ++i) {
      if (!links[i].is_end()) continue;
      STD_TORCH_CHECK(end < grad_outputs.size(),
                      "grad_outputs are too few: ", grad_outputs.size());
      grad_links_[i] = grad_outputs[end++];
    }
    // As the graph of the layers goes: what came last is first.
    for (size_t i = links.size(); i-- > 0;) {
      if (!grad_links_[i] || !wanted_[i]) continue;
      Tensor grad = std::move(*grad_links_[i]);
      grad_links_[i].reset();
      const Link& link = links[i];
      const int64_t* need = &needs_[link.layer * kParameters];
      const bool needs_x = is_wanted(link.source);
      const bool needs_conv = needs_x || need[0] != 0 || need[1] != 0;
      undo_follower(i, grad, needs_conv);
      if (!needs_conv) continue;
      if (observed_ && i == 0) {
        // What the op returns must not be what it got.
        first = link.follows == Follows::kNothing ? torch::stable::clone(grad)
                                                  : grad;
      }
      const std::optional<Tensor> grad_x = undo_conv(link, grad, needs_x);
      if (grad_x) add_grad(link.source, *grad_x);
    }
  }

  OptionalTensors grad_inputs;
  std::optional<Tensor> first;  // of what the first convolution returned
  OptionalTensors grads;        // of parameters

 private:
  bool wants_any(size_t layer) const {
    const int64_t* need = &needs_[layer * kParameters];
    return std::any_of(need, need + kParameters,
                       [](int64_t wanted) { return wanted != 0; });
  }

  // Whether it, or anything before it, wants a gradient.
  bool is_wanted(const Source& source) const {
    return source.is_input() ? needs_inputs_[source.index()] != 0
                             : wanted_[source.index()];
  }

  // As the layers' graph adds: in the dtype of what the gradient is of.
  void add_grad(const Source& source, const Tensor& grad) {
    auto& sums = source.is_input() ? grad_inputs : grad_links_;
    accumulate(sums[source.index()], grad, wide_ && source.is_input());
  }
  void add_parameter_grad(size_t parameter, const Tensor& grad) {
    accumulate(grads[parameter], grad, true);
  }

  const Layout& layout_of(size_t link) const {
    return layouts_[grad_inputs.size() + link];
  }

  // From the gradient of what follows a convolution to that of its output.
  void undo_follower(size_t i, Tensor& grad, bool needs_conv) {
    const Link& link = plan_.links()[i];
    if (link.follows == Follows::kNothing) return;
    const Tensor* kept = kept_.data() + first_kept_[i];
    grad = with_strides(grad, layout_of(i).strides);
    if (link.follows == Follows::kReLU) {
      std::tie(grad) = call<Tensor>("mmactnn::relu_codes_backward", grad,
                                    kept[0], link.bits);
      return;
    }
    const size_t first = link.layer * kParameters;
    std::optional<Tensor> act_codes;
    if (link.added) act_codes = kept[3];
    const auto [results] = call<std::vector<Tensor>>(
        "mmactnn::batch_norm_act_backward", grad, kept[1], kept[2], act_codes,
        parameters_[first + 2], kept[0], link.follows == Follows::kNormReLU,
        link.of_batch, needs_conv, link.bits, link.act_bits, link.group_size);
    // The gradient of the bias is first.
    for (const size_t k : {2, 3}) {
      if (needs_[first + k] != 0) add_parameter_grad(first + k, results[3 - k]);
    }
    if (link.added && is_wanted(*link.added)) {
      add_grad(*link.added, results.back());
    }
    if (needs_conv) grad = results[2];
  }

  // What a convolution read.
  Tensor decode_source(const Source& source) const {
    const size_t i = source.index();
    if (source.is_input()) {
      return decode(codes_.data() + first_code_[i], formats_[i], layouts_[i],
                    dtype_);
    }
    const Link& link = plan_.links()[i];
    const Tensor* kept = kept_.data() + first_kept_[i];
    const Layout& layout = layout_of(i);
    if (link.follows == Follows::kReLU || link.added) {
      const bool added = link.added.has_value();
      const Tensor* codes = kept + (added ? 3 : 0);
      return std::get<0>(call<Tensor>("mmactnn::dequantize_zeroed", codes[0],
                                      codes[1], layout.sizes, layout.strides,
                                      dtype_, added ? link.act_bits : link.bits,
                                      link.group_size));
    }
    STD_TORCH_CHECK(link.follows == Follows::kNormReLU,
                    "what a convolution reads of another must be rectified");
    const auto* parameter = &parameters_[link.layer * kParameters];
    return std::get<0>(call<Tensor>("mmactnn::dequantize_split", kept[1],
                                    kept[2], parameter[2], parameter[3],
                                    layout.sizes, layout.strides, dtype_,
                                    link.bits, link.group_size));
  }

  // The gradients of a convolution, of which some are needed; returns that of
  // its input.
  std::optional<Tensor> undo_conv(const Link& link, const Tensor& grad,
                                  bool needs_x) {
    const int64_t* need = &needs_[link.layer * kParameters];
    const bool needs_weight = need[0] != 0, needs_bias = need[1] != 0;
    if (needs_weight || needs_bias) {
      // That of a bias alone reads it, too, on a CPU.
      const Tensor x = decode_source(link.source);
      const bool all = !needs_x || x.numel() * x.element_size() < kLarge;
      const std::optional<Tensor> grad_x = convolution_backward(
          link, grad, x, {needs_x && all, needs_weight, needs_bias});
      if (all) return grad_x;
    }
    return convolution_backward(link, grad, hollow_source(link),
                                {true, false, false});
  }

  // What a convolution read, for ops that use nothing of it but its shape. On
  // CUDA its memory is that of the weight: a tensor must have some. On the CPU
  // it is as large as it says, and not written to, which costs nothing: ops may
  // convert the layout of all their arguments there, and so read them.
  Tensor hollow_source(const Link& link) const {
    const size_t i = link.source.index();
    const Layout& layout = link.source.is_input() ? layouts_[i] : layout_of(i);
    const Tensor& weight = *parameters_[link.layer * kParameters];
    if (weight.is_cpu()) {
      return empty_strided(weight, layout.sizes, layout.strides, dtype_);
    }
    return torch::stable::from_blob(const_cast<void*>(weight.const_data_ptr()),
                                    layout.sizes, layout.strides,
                                    weight.device(), dtype_);
  }

  std::optional<Tensor> convolution_backward(const Link& link,
                                             const Tensor& grad,
                                             const Tensor& x,
                                             std::array<bool, 3> wanted) {
    const size_t first = link.layer * kParameters;
    const int64_t channels = grad.size(1);
    std::optional<Sizes> bias_sizes;
    if (wanted[2]) bias_sizes = Sizes(&channels, 1);
    const auto [grad_x, grad_weight, grad_bias] = call<Tensor, Tensor, Tensor>(
        "aten::convolution_backward", grad, x, *parameters_[first], bias_sizes,
        link.stride, link.padding, link.dilation, false,
        Sizes(kNoPadding.data(), link.stride.size()), link.groups,
        torch::headeronly::HeaderOnlyArrayRef<bool>(wanted.data(), 3));
    if (wanted[1]) add_parameter_grad(first, grad_weight);
    if (wanted[2]) add_parameter_grad(first + 1, grad_bias);
    if (!wanted[0]) return std::nullopt;
    return grad_x;
  }

  const OptionalTensors& codes_;
  const std::vector<Format> formats_;
  const OptionalTensors& parameters_;
  const std::vector<Tensor>& kept_;
  const std::vector<Layout> layouts_;
  const Plan plan_;
  const Integers& needs_;
  const Integers& needs_inputs_;
  const bool wide_;
  const bool observed_;
  const ScalarType dtype_;
  std::vector<size_t> first_code_;  // of each input
  std::vector<size_t> first_kept_;  // of each link
  std::vector<bool> wanted_;        // links, or anything before them
  OptionalTensors grad_links_;
};

OptionalTensors conv_chain_backward(OptionalTensors grad_outputs,
                                    OptionalTensors codes, Integers formats,
                                    OptionalTensors parameters,
                                    std::vector<Tensor> kept, Integers layouts,
                                    Integers plan, Integers needs,
                                    Integers needs_inputs, bool wide,
                                    bool observed, ScalarType dtype) {
  const NoGrad no_grad;
  Backward backward(codes, formats, parameters, kept, layouts, plan, needs,
                    needs_inputs, wide, observed, dtype);
  backward.run(grad_outputs);
  OptionalTensors results = std::move(backward.grad_inputs);
  results.push_back(backward.first);
  results.insert(results.end(), backward.grads.begin(), backward.grads.end());
  return results;
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_FRAGMENT(mmactnn, m) {
  m.def(
      "conv_chain(Tensor[] inputs, Tensor?[] parameters, "
      "Tensor(a!)?[] buffers, int[] plan, float[] settings, int[] formats, "
      "int seed, int offset) -> (Tensor[] outputs, Tensor[] codes, "
      "Tensor[] kept, Tensor layouts)");
  m.def(
      "conv_chain_backward(Tensor?[] grad_outputs, Tensor?[] codes, "
      "int[] formats, Tensor?[] parameters, Tensor[] kept, int[] layouts, "
      "int[] plan, int[] needs, int[] needs_inputs, bool wide, bool observed, "
      "ScalarType dtype) -> Tensor?[]");
}

MMACTNN_IMPL(m) {
  m.impl("conv_chain", TORCH_BOX(&mmactnn::conv_chain));
  m.impl("conv_chain_backward", TORCH_BOX(&mmactnn::conv_chain_backward));
}
