// Chain of convolutions with their epilogues, in one call of an op: for small
// tensors, calls and the work of the caller between them take longer than the
// kernels. It consists of other ops, and runs on any device that has these.
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
#include "input_payload.h"
#include "plan.h"

namespace mmactnn {
namespace {

using OptionalTensors = std::vector<std::optional<Tensor>>;
using Integers = std::vector<int64_t>;

// Numbers of tensors of each layer in the lists.
constexpr size_t kParameters = 4;  // weight, bias; scale and shift
constexpr size_t kBuffers = 3;  // running mean and variance, count of batches

// Output padding of all convolutions.
constexpr std::array<int64_t, kMaxDims> kNoPadding{};

// Bytes of the input of a convolution from which on its two gradients come from
// two calls, so that the input and its gradient need not live together. Another
// call is short compared with the kernels for tensors of this size. The limit
// for single layers, in mmactnn/autograd/conv.py, is lower: a chain is there to
// save calls.
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

// Disables autograd while it lives: the gradients of the chain come from an op
// of their own.
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

// Number of layers in a list of parameters.
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
          int64_t seed, int64_t offset, bool rotated)
      : inputs_(inputs),
        parameters_(parameters),
        buffers_(buffers),
        plan_(plan, inputs.size(), count_layers(parameters)),
        formats_(read_formats(formats, inputs.size())),
        seed_(seed),
        draw_(offset),
        rotated_(rotated),
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
    const auto& steps = plan_.steps();
    std::vector<int64_t> readers;
    for (const Step& step : steps) readers.push_back(step.readers);
    outputs_.resize(steps.size());
    // Frees outputs that no later step reads.
    const auto release = [&](const Source& source) {
      if (source.is_input()) return;
      const size_t i = source.index();
      if (--readers[i] == 0) outputs_[i].reset();
    };
    for (size_t i = 0; i < steps.size(); ++i) {
      const Step& step = steps[i];
      if (step.source.is_input()) encode_input(step.source.index());
      const Tensor output = convolve(step);
      append_layout(layouts_, output);
      if (step.has_norm()) {
        normalise(step, output);
      } else if (step.epilogue == Epilogue::kReLU) {
        const auto [codes, ranges] = call<Tensor, Tensor>(
            "mmactnn::relu_codes_", output, step.bits, step.group_size, seed_,
            draw_++, kNoTensor, rotated_);
        kept_.push_back(codes);
        kept_.push_back(ranges);
      }
      outputs_[i] = output;
      release(step.source);
      if (step.added) release(*step.added);
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

  // Unless it has a payload already, from this chain or another layer.
  void encode_input(size_t n) {
    if (formats_[n].kind == PayloadKind::kNone || !codes_[n].empty()) return;
    codes_[n] = encode(inputs_[n], formats_[n], seed_, draw_++, rotated_);
  }

  Tensor convolve(const Step& step) const {
    const auto* parameter = &parameters_[step.layer * kParameters];
    return std::get<0>(call<Tensor>(
        "aten::convolution", read(step.source), *parameter[0], parameter[1],
        step.stride, step.padding, step.dilation, false,
        Sizes(kNoPadding.data(), step.stride.size()), step.groups));
  }

  void normalise(const Step& step, const Tensor& x) {
    const auto* parameter = &parameters_[step.layer * kParameters];
    const auto* buffer = &buffers_[step.layer * kBuffers];
    const auto [momentum, eps] = settings_[step.layer];
    std::optional<Tensor> added;
    if (step.added) added = with_strides(read(*step.added), x.strides());
    const auto [invstd, codes, ranges, act_codes, act_ranges] =
        call<Tensor, Tensor, Tensor, Tensor, Tensor>(
            "mmactnn::batch_norm_act_", x, added, parameter[2], parameter[3],
            buffer[0], buffer[1], buffer[2], step.use_batch_stats, momentum,
            eps, step.epilogue == Epilogue::kNormReLU, step.bits, step.act_bits,
            step.group_size, seed_, draw_++, kNoTensor, rotated_);
    kept_.insert(kept_.end(), {invstd, codes, ranges});
    if (step.added) kept_.insert(kept_.end(), {act_codes, act_ranges});
  }

  const std::vector<Tensor>& inputs_;
  const OptionalTensors& parameters_;
  const OptionalTensors& buffers_;
  const Plan plan_;
  const std::vector<Format> formats_;
  std::vector<std::pair<double, double>> settings_;
  const int64_t seed_;
  int64_t draw_;
  const bool rotated_;
  OptionalTensors outputs_;                 // of steps
  std::vector<std::vector<Tensor>> codes_;  // of inputs
  std::vector<Tensor> kept_;
  Integers layouts_;
};

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
           Tensor>
conv_chain(std::vector<Tensor> inputs, OptionalTensors parameters,
           OptionalTensors buffers, Integers plan, std::vector<double> settings,
           Integers formats, int64_t seed, int64_t offset, bool rotated) {
  const NoGrad no_grad;
  Forward forward(inputs, parameters, buffers, plan, settings, formats, seed,
                  offset, rotated);
  forward.run();
  return {forward.outputs(), forward.codes(), forward.kept(),
          on_host(forward.layouts())};
}

// Adds to a sum that may still be empty; `wide` sums are float32 from the
// second part on. The stable API has no addition, but a subtraction.
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
           ScalarType dtype, const Integers& draws)
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
    const size_t steps = plan_.steps().size();
    input_draws_ = read_draws(draws, grad_inputs.size() + steps);
    step_draws_.assign(input_draws_.begin() + grad_inputs.size(),
                       input_draws_.end());
    input_draws_.resize(grad_inputs.size());
    STD_TORCH_CHECK(needs.size() == parameters.size() &&
                        layouts_.size() == grad_inputs.size() + steps,
                    "needs must have an entry for each of the parameters, and "
                    "layouts one for each input and convolution");
    size_t count = 0;
    for (const Format& format : formats_) {
      first_code_.push_back(count);
      count += format.num_saved();
    }
    STD_TORCH_CHECK(count == codes.size(), "codes must be ", count,
                    " tensors, got ", codes.size());
    count = 0;
    for (const Step& step : plan_.steps()) {
      first_kept_.push_back(count);
      count += step.num_saved();
      wanted_.push_back(is_wanted(step.source) ||
                        (step.added && is_wanted(*step.added)) ||
                        wants_any(step.layer));
    }
    STD_TORCH_CHECK(count == kept.size(), "kept must be ", count,
                    " tensors, got ", kept.size());
  }

  void run(const OptionalTensors& grad_outputs) {
    const auto& steps = plan_.steps();
    grad_steps_.resize(steps.size());
    size_t end = 0;
    for (size_t i = 0; i < steps.size(); ++i) {
      if (!steps[i].is_output()) continue;
      STD_TORCH_CHECK(end < grad_outputs.size(),
                      "grad_outputs are too few: ", grad_outputs.size());
      grad_steps_[i] = grad_outputs[end++];
    }
    // In reverse order, as in the graph of the layers.
    for (size_t i = steps.size(); i-- > 0;) {
      if (!grad_steps_[i] || !wanted_[i]) continue;
      Tensor grad = std::move(*grad_steps_[i]);
      grad_steps_[i].reset();
      const Step& step = steps[i];
      const int64_t* need = &needs_[step.layer * kParameters];
      const bool needs_x = is_wanted(step.source);
      const bool needs_conv = needs_x || need[0] != 0 || need[1] != 0;
      undo_epilogue(i, grad, needs_conv);
      if (!needs_conv) continue;
      if (observed_ && i == 0) {
        // An op must not return its argument.
        first = step.epilogue == Epilogue::kNone ? torch::stable::clone(grad)
                                                 : grad;
      }
      const std::optional<Tensor> grad_x = undo_conv(step, grad, needs_x);
      if (grad_x) add_grad(step.source, *grad_x);
    }
  }

  OptionalTensors grad_inputs;
  std::optional<Tensor> first;  // of the first convolution's output
  OptionalTensors grads;        // of parameters

 private:
  bool wants_any(size_t layer) const {
    const int64_t* need = &needs_[layer * kParameters];
    return std::any_of(need, need + kParameters,
                       [](int64_t wanted) { return wanted != 0; });
  }

  // Whether a source, or anything before it, wants a gradient.
  bool is_wanted(const Source& source) const {
    return source.is_input() ? needs_inputs_[source.index()] != 0
                             : wanted_[source.index()];
  }

  // As autograd adds: in the dtype of the tensor that the gradient is of.
  void add_grad(const Source& source, const Tensor& grad) {
    auto& sums = source.is_input() ? grad_inputs : grad_steps_;
    accumulate(sums[source.index()], grad, wide_ && source.is_input());
  }
  void add_parameter_grad(size_t parameter, const Tensor& grad) {
    accumulate(grads[parameter], grad, true);
  }

  const Layout& layout_of(size_t step) const {
    return layouts_[grad_inputs.size() + step];
  }

  // Turns the gradient of a step's output into that of its convolution's.
  void undo_epilogue(size_t i, Tensor& grad, bool needs_conv) {
    const Step& step = plan_.steps()[i];
    if (step.epilogue == Epilogue::kNone) return;
    const Tensor* kept = kept_.data() + first_kept_[i];
    grad = with_strides(grad, layout_of(i).strides);
    if (step.epilogue == Epilogue::kReLU) {
      std::tie(grad) =
          call<Tensor>("mmactnn::relu_codes_backward", grad, kept[0], step.bits,
                       step_draws_[i].rotated());
      return;
    }
    const size_t first = step.layer * kParameters;
    std::optional<Tensor> act_codes;
    if (step.added) act_codes = kept[3];
    const auto [results] = call<std::vector<Tensor>>(
        "mmactnn::batch_norm_act_backward", grad, kept[1], kept[2], act_codes,
        parameters_[first + 2], kept[0], step.epilogue == Epilogue::kNormReLU,
        step.use_batch_stats, needs_conv, step.bits, step.act_bits,
        step.group_size, step_draws_[i].drawn(), kNoTensor);
    // The gradient of the bias is first.
    for (const size_t k : {2, 3}) {
      if (needs_[first + k] != 0) add_parameter_grad(first + k, results[3 - k]);
    }
    if (step.added && is_wanted(*step.added)) {
      add_grad(*step.added, results.back());
    }
    if (needs_conv) grad = results[2];
  }

  // Decodes the input of a convolution.
  Tensor decode_source(const Source& source) const {
    const size_t i = source.index();
    if (source.is_input()) {
      return decode(codes_.data() + first_code_[i], formats_[i], layouts_[i],
                    dtype_, input_draws_[i]);
    }
    const Step& step = plan_.steps()[i];
    const Tensor* kept = kept_.data() + first_kept_[i];
    const Layout& layout = layout_of(i);
    if (step.epilogue == Epilogue::kReLU || step.added) {
      const bool added = step.added.has_value();
      const Tensor* codes = kept + (added ? 3 : 0);
      const Draw draw = added ? step_draws_[i].second() : step_draws_[i];
      return std::get<0>(call<Tensor>(
          "mmactnn::dequantize_zeroed", codes[0], codes[1], layout.sizes,
          layout.strides, dtype_, added ? step.act_bits : step.bits,
          step.group_size, draw.drawn(), kNoTensor));
    }
    STD_TORCH_CHECK(step.epilogue == Epilogue::kNormReLU,
                    "what a convolution reads of another must be rectified");
    const auto* parameter = &parameters_[step.layer * kParameters];
    return std::get<0>(call<Tensor>(
        "mmactnn::dequantize_split", kept[1], kept[2], parameter[2],
        parameter[3], layout.sizes, layout.strides, dtype_, step.bits,
        step.group_size, step_draws_[i].drawn(), kNoTensor));
  }

  // The gradients of a convolution, of which some are needed; returns that of
  // its input.
  std::optional<Tensor> undo_conv(const Step& step, const Tensor& grad,
                                  bool needs_x) {
    const int64_t* need = &needs_[step.layer * kParameters];
    const bool needs_weight = need[0] != 0, needs_bias = need[1] != 0;
    if (needs_weight || needs_bias) {
      // On a CPU the gradient of a bias alone reads the input, too.
      const Tensor x = decode_source(step.source);
      const bool all = !needs_x || x.numel() * x.element_size() < kLarge;
      const std::optional<Tensor> grad_x = convolution_backward(
          step, grad, x, {needs_x && all, needs_weight, needs_bias});
      if (all) return grad_x;
    }
    return convolution_backward(step, grad, placeholder_source(step),
                                {true, false, false});
  }

  // Stands for the input of a convolution in ops that only use its shape. On
  // CUDA it refers to the memory of the weight, since a tensor must have some.
  // On the CPU it has memory that is never written to, which costs nothing:
  // there ops may convert the layout of all their arguments, and so read them.
  Tensor placeholder_source(const Step& step) const {
    const size_t i = step.source.index();
    const Layout& layout = step.source.is_input() ? layouts_[i] : layout_of(i);
    const Tensor& weight = *parameters_[step.layer * kParameters];
    if (weight.is_cpu()) {
      return empty_strided(weight, layout.sizes, layout.strides, dtype_);
    }
    return torch::stable::from_blob(const_cast<void*>(weight.const_data_ptr()),
                                    layout.sizes, layout.strides,
                                    weight.device(), dtype_);
  }

  std::optional<Tensor> convolution_backward(const Step& step,
                                             const Tensor& grad,
                                             const Tensor& x,
                                             std::array<bool, 3> wanted) {
    const size_t first = step.layer * kParameters;
    const int64_t channels = grad.size(1);
    std::optional<Sizes> bias_sizes;
    if (wanted[2]) bias_sizes = Sizes(&channels, 1);
    const auto [grad_x, grad_weight, grad_bias] = call<Tensor, Tensor, Tensor>(
        "aten::convolution_backward", grad, x, *parameters_[first], bias_sizes,
        step.stride, step.padding, step.dilation, false,
        Sizes(kNoPadding.data(), step.stride.size()), step.groups,
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
  std::vector<Draw> input_draws_;
  std::vector<Draw> step_draws_;
  std::vector<size_t> first_code_;  // of each input
  std::vector<size_t> first_kept_;  // of each step
  std::vector<bool> wanted_;        // steps, or anything before them
  OptionalTensors grad_steps_;
};

OptionalTensors conv_chain_backward(
    OptionalTensors grad_outputs, OptionalTensors codes, Integers formats,
    OptionalTensors parameters, std::vector<Tensor> kept, Integers layouts,
    Integers plan, Integers needs, Integers needs_inputs, bool wide,
    bool observed, ScalarType dtype, Integers draws) {
  const NoGrad no_grad;
  Backward backward(codes, formats, parameters, kept, layouts, plan, needs,
                    needs_inputs, wide, observed, dtype, draws);
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
      "int seed, int offset, bool rotated=False) -> (Tensor[] outputs, "
      "Tensor[] codes, "
      "Tensor[] kept, Tensor layouts)");
  m.def(
      "conv_chain_backward(Tensor?[] grad_outputs, Tensor?[] codes, "
      "int[] formats, Tensor?[] parameters, Tensor[] kept, int[] layouts, "
      "int[] plan, int[] needs, int[] needs_inputs, bool wide, bool observed, "
      "ScalarType dtype, int[] draws=[]) -> Tensor?[]");
}

MMACTNN_IMPL(m) {
  m.impl("conv_chain", TORCH_BOX(&mmactnn::conv_chain));
  m.impl("conv_chain_backward", TORCH_BOX(&mmactnn::conv_chain_backward));
}
