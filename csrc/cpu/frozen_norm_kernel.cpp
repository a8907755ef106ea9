
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../common/channels.h"
#include "../common/frozen_norm.h"
#include "group.h"
#include "number.h"
#include "parallel.h"

namespace mmactnn {
namespace {

// Adjacent elements of a row: of one channel or, with channels last, one of
// each channel.
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

}  // namespace

namespace cpu {

void frozen_norm_act(const Memory& input, const Channels& channels,
                     const Memory& residual, const FrozenParameters& parameters,
                     bool relu) {
  std::vector<FrozenChannel> constants;
  for (int64_t c = 0; c < channels.count; ++c) {
    constants.push_back(parameters.channel(c));
  }
  const int64_t piece = channels.last ? channels.count : channels.plane;
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* values = static_cast<T*>(input.mutable_data_ptr());
    const T* others = static_cast<const T*>(residual.const_data_ptr());
    parallel_for(
        channels.numel() / piece, std::max<int64_t>(kGrainElements / piece, 1),
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

}  // namespace cpu
}  // namespace mmactnn
