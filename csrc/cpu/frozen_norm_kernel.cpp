#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../common/channels.h"
#include "../common/frozen_norm.h"
#include "../common/tensor_checks.h"
#include "group.h"
#include "number.h"

namespace mmactnn {
namespace {

// What lies side by side of a row: elements of one channel or, channels last,
// one of each.
template <typename T, typename ChannelOf>
void run_piece(T* values, const T* residual, int64_t count, bool relu,
               const ChannelOf& channel_of) {
  for (int64_t i = 0; i < count; ++i) {
    float value = channel_of(i).apply(static_cast<float>(values[i]));
    if (residual != nullptr) {
      value = add(value, static_cast<float>(residual[i]));
    }
    values[i] = static_cast<T>(relu ? rectify(value) : value);
  }
}

void frozen_norm_act_(Tensor input, std::optional<Tensor> residual, Tensor mean,
                      Tensor var, std::optional<Tensor> weight,
                      std::optional<Tensor> bias, double eps, bool relu) {
  const Channels channels =
      check_frozen_norm(input, residual, mean, var, weight, bias);
  if (channels.numel() == 0) return;
  const auto read = [](const std::optional<Tensor>& tensor, int64_t channel,
                       float none) {
    if (!tensor) return none;
    return static_cast<const float*>(tensor->const_data_ptr())[channel];
  };
  std::vector<FrozenChannel> constants;
  for (int64_t c = 0; c < channels.count; ++c) {
    constants.push_back(FrozenChannel::of(
        read(mean, c, 0.0f), read(var, c, 1.0f), static_cast<float>(eps),
        read(weight, c, kNoWeight), read(bias, c, kNoBias)));
  }
  const int64_t piece = channels.last ? channels.count : channels.plane;
  dispatch_dtype(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* values = static_cast<T*>(input.mutable_data_ptr());
    const T* others = static_cast<const T*>(data_or_null(residual));
    torch::stable::parallel_for(
        0, channels.numel() / piece,
        std::max<int64_t>(kGrainElements / piece, 1),
        [&](int64_t begin, int64_t end) {
          for (int64_t p = begin; p < end; ++p) {
            T* own = values + p * piece;
            const T* other = others == nullptr ? nullptr : others + p * piece;
            if (channels.last) {
              run_piece(own, other, piece, relu,
                        [&](int64_t i) { return constants[i]; });
            } else {
              const FrozenChannel constant = constants[p % channels.count];
              run_piece(own, other, piece, relu,
                        [=](int64_t) { return constant; });
            }
          }
        });
  });
}

}  // namespace
}  // namespace mmactnn

STABLE_TORCH_LIBRARY_IMPL(mmactnn, CPU, m) {
  m.impl("frozen_norm_act_", TORCH_BOX(&mmactnn::frozen_norm_act_));
}
