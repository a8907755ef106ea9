// Calls of ops through the dispatcher.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <tuple>
#include <utility>

#include "errors.h"

namespace mmactnn {

template <typename... Results, size_t... I>
std::tuple<Results...> unpack_stack(const StableIValue* stack,
                                    std::index_sequence<I...>) {
  return {torch::stable::detail::to<Results>(stack[I])...};
}

// Calls an op without overloads. The arguments must be all those of its schema,
// with its types and in its order: there are no defaults.
template <typename... Results, typename... Arguments>
std::tuple<Results...> call(const char* op, const Arguments&... arguments) {
  constexpr size_t kSlots = std::max(sizeof...(Arguments), sizeof...(Results));
  std::array<StableIValue, kSlots> stack{
      torch::stable::detail::from(arguments)...};
  STD_TORCH_CHECK(torch_call_dispatcher(op, "", stack.data(),
                                        TORCH_ABI_VERSION) == TORCH_SUCCESS,
                  op, " failed: ", last_error());
  return unpack_stack<Results...>(stack.data(),
                                  std::index_sequence_for<Results...>{});
}

}  // namespace mmactnn
