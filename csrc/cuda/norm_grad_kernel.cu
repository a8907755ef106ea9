#include <cstdint>

#include "../common/channels.h"
#include "../common/codec.h"
#include "../common/dispatch.h"
#include "../common/geometry.h"
#include "../common/norm.h"
#include "../common/norm_codes.h"
#include "block.h"
#include "channel_walk.h"
#include "launch.h"
#include "norm_codes.h"
#include "norm_sums.h"
#include "rotated.h"
#include "workspace.h"

namespace mmactnn {
namespace {

// Pieces whose loads a thread issues together.
template <typename T, int kItems>
constexpr int kPiecesAtOnce = kItems == kBlock && sizeof(T) == 4 ? 2 : 4;

// The same where factors of two channels are loaded for each.
template <int kItems>
constexpr int kFactoredAtOnce = kItems == kBlock ? 2 : 4;

// Thread blocks of a multiprocessor that registers must suffice for.
template <int kBits, int kWanted>
constexpr int kResident = kBits == kAnyBits ? kWanted - 1 : kWanted;

// Sums of the gradients that pass and of their products with the normalised
// input. Those of several splits go to `partial`, [splits, 2, C]; `grad`, of
// NormCodes::kMask, takes those gradients.
template <typename T, int kBits, NormCodes kCodes, int kItems>
__global__ void __launch_bounds__(kThreads, kResident<kBits, 4>)
    plane_sums_kernel(const T* __restrict__ grad_output, T* __restrict__ grad,
                      float* __restrict__ partial, SumsOutputs outputs,
                      NormPayload payload, Planes planes) {
  using Piece = NormPiece<T, kBits, kCodes, kItems>;
  // Outputs take registers, too.
  constexpr int kAtOnce = kCodes == NormCodes::kMask && kItems == kBlock
                              ? 2
                              : kPiecesAtOnce<T, kItems>;
  const PlaneCursor<kItems> cursor(planes);
  const DitherDraws draws(payload.dither);
  float sum = 0.0f, product = 0.0f;
  for (uint32_t i = threadIdx.x; i < cursor.pieces; i += kThreads * kAtOnce) {
    Piece piece[kAtOnce];
    PlanePiece place[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      place[u] = cursor.at(i + u * kThreads);
      piece[u].load(payload, grad_output, place[u].row, place[u].piece);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (!cursor.any(place[u])) continue;
      const auto include = [&](const auto& holds) {
        piece[u].template for_each<true>(
            payload, draws, [&](int j, bool passed, float value, float normal) {
              if (passed && holds(j)) {
                sum += value;
                product = fmaf(value, normal, product);
              }
            });
      };
      if (cursor.whole(place[u])) {
        include([](int) { return true; });
      } else {
        include([&](int j) { return cursor.holds(place[u], j); });
      }
      if constexpr (kCodes == NormCodes::kMask) {
        // A piece is written by the channel that its first element is of.
        if (place[u].first >= 0) {
          piece[u].store_passed(payload, grad);
        }
      }
    }
  }
  sum = block_sum(sum);
  product = block_sum(product);
  if (threadIdx.x != 0) return;
  if (gridDim.y == 1) {
    outputs.write(blockIdx.x, 0, sum);
    outputs.write(blockIdx.x, 1, product);
  } else {
    float* target = partial + int64_t{2} * blockIdx.y * gridDim.x + blockIdx.x;
    target[0] = sum;
    target[gridDim.x] = product;
  }
}

template <typename T, int kBits, NormCodes kCodes, int kItems>
__global__ void __launch_bounds__(kThreads, kResident<kBits, 4>)
    column_sums_kernel(const T* __restrict__ grad_output, T* __restrict__ grad,
                       float* __restrict__ partial, SumsOutputs outputs,
                       NormPayload payload, Columns columns) {
  using Piece = NormPiece<T, kBits, kCodes, kItems>;
  constexpr int kAtOnce = kPiecesAtOnce<T, kItems>;
  const ColumnCursor cursor(columns);
  const DitherDraws draws(payload.dither);
  // Sums, then products.
  float total[2 * kItems] = {};
  for (uint32_t k = 0; k < cursor.count; k += kAtOnce) {
    Piece piece[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const PieceIndex place = cursor.at(k + u);
      piece[u].load(payload, grad_output, place.row, place.piece);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (k + u >= cursor.count) continue;
      piece[u].template for_each<true>(
          payload, draws, [&](int j, bool passed, float value, float normal) {
            if (passed) {
              total[j] += value;
              total[kItems + j] = fmaf(value, normal, total[kItems + j]);
            }
          });
      if constexpr (kCodes == NormCodes::kMask) {
        piece[u].store_passed(payload, grad);
      }
    }
  }
  __shared__ float shared[2 * kItems][kThreads];
#pragma unroll
  for (int j = 0; j < 2 * kItems; ++j) shared[j][threadIdx.x] = total[j];
  __syncthreads();
  // [2, C] numbers: kItems of `columns` side by side, twice.
  const uint32_t numbers = columns.columns * 2 * kItems;
  for (uint32_t o = threadIdx.x; o < numbers; o += kThreads) {
    const uint32_t j = columns.by_columns.quotient(o);
    const uint32_t lane = o - j * columns.columns;
    const uint32_t column = blockIdx.x * columns.columns + lane;
    if (column >= columns.total) continue;
    float result = 0.0f;
    for (uint32_t p = 0; p < columns.pixels; ++p) {
      result += shared[j][p * columns.columns + lane];
    }
    const int64_t channel = int64_t{column} * kItems + j % kItems;
    if (gridDim.y == 1) {
      outputs.write(channel, j / kItems, result);
    } else {
      const int64_t row = int64_t{2} * blockIdx.y + j / kItems;
      partial[row * outputs.channels + channel] = result;
    }
  }
}

__global__ void __launch_bounds__(kFinishThreads)
    finish_sums_kernel(const float* __restrict__ partial, SumsOutputs outputs,
                       uint32_t splits) {
  const int64_t width = 2 * outputs.channels;
  const int64_t column =
      int64_t{blockIdx.x} * kFinishColumns + threadIdx.x % kFinishColumns;
  double sum[1] = {};
  if (column < width) {
    float own[kFinishAtOnce];
    for_each_split(
        splits,
        [&](int u, uint32_t split) {
          own[u] = partial[split * width + column];
        },
        [&](int u) { sum[0] += own[u]; });
  }
  column_sums(sum);
  if (threadIdx.x < kFinishColumns && column < width) {
    const int which = column < outputs.channels ? 0 : 1;
    outputs.write(column - which * outputs.channels, which,
                  static_cast<float>(sum[0]));
  }
}

// Channel after channel, by pieces in memory order. Of the channels of a
// piece of more than one element, at least 8 elements each lie in a row.
template <typename T, int kBits, NormCodes kCodes, int kItems>
__global__ void __launch_bounds__(kThreads, kResident<kBits, 4>)
    plane_grad_kernel(const T* __restrict__ grad_output,
                      T* __restrict__ grad_input, NormPayload payload,
                      NormVectors vectors, uint32_t pieces, Divider by_row,
                      Divider by_plane) {
  using Piece = NormPiece<T, kBits, kCodes, kItems>;
  constexpr int kAtOnce = kFactoredAtOnce<kItems>;
  const DitherDraws draws(payload.dither);
  Piece piece[kAtOnce];
  ChannelFactors first[kAtOnce], second[kAtOnce];
  int split[kAtOnce];  // elements of the first channel
  const uint32_t begin = blockIdx.x * (kThreads * kAtOnce) + threadIdx.x;
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    const uint32_t index = begin + u * kThreads;
    if (index >= pieces) continue;
    const PieceIndex place = advance({0, 0}, index, by_row);
    piece[u].load(payload, grad_output, place.row, place.piece);
    // A row has less than 2^31 elements, see the launcher.
    const uint32_t element = place.piece * kItems;
    const uint32_t channel = by_plane.quotient(element);
    first[u] = load_factors(vectors, channel);
    split[u] = static_cast<int>((channel + 1) * by_plane.divisor - element);
    if (split[u] < kItems) second[u] = load_factors(vectors, channel + 1);
  }
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    if (begin + u * kThreads >= pieces) continue;
    float passed[kItems], normal[kItems];
    piece[u].decode(payload, draws, passed, normal);
    T result[kItems];
    const auto compute = [&](const auto& factors) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        const ChannelFactors f = factors(j);
        result[j] = Number<T>::store(norm_grad(
            passed[j], normal[j], f.mean_grad, f.mean_product, f.scale));
      }
    };
    if (split[u] >= kItems) {
      compute([&](int) { return first[u]; });
    } else {
      compute([&](int j) { return j < split[u] ? first[u] : second[u]; });
    }
    store_items<T, kItems>(piece[u].in(grad_input), result);
  }
}

template <typename T, int kBits, NormCodes kCodes, int kItems>
__global__ void __launch_bounds__(kThreads, kResident<kBits, 3>)
    column_grad_kernel(const T* __restrict__ grad_output,
                       T* __restrict__ grad_input, NormPayload payload,
                       NormVectors vectors, Columns columns) {
  using Piece = NormPiece<T, kBits, kCodes, kItems>;
  constexpr int kAtOnce = kPiecesAtOnce<T, kItems>;
  const ColumnCursor cursor(columns);
  if (cursor.count == 0) return;
  const DitherDraws draws(payload.dither);
  ChannelFactors factors[kItems];
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    factors[j] = load_factors(vectors, int64_t{cursor.column} * kItems + j);
  }
  for (uint32_t k = 0; k < cursor.count; k += kAtOnce) {
    Piece piece[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const PieceIndex place = cursor.at(k + u);
      piece[u].load(payload, grad_output, place.row, place.piece);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (k + u >= cursor.count) continue;
      float passed[kItems], normal[kItems];
      piece[u].decode(payload, draws, passed, normal);
      T result[kItems];
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        result[j] = Number<T>::store(
            norm_grad(passed[j], normal[j], factors[j].mean_grad,
                      factors[j].mean_product, factors[j].scale));
      }
      store_items<T, kItems>(piece[u].in(grad_input), result);
    }
  }
}

// Arguments of a launcher, from a checked call.
struct Call {
  Channels channels;
  NormPayload payload;
  cudaStream_t stream;
  bool blocks;  // all blocks of codes are aligned, and so are the gradients'
  bool whole_groups;  // no row ends within one
};

Call make_call(const Memory& grad_output, const NormArguments& arguments) {
  const Channels& channels = arguments.channels;
  const Geometry& geometry = arguments.geometry;
  check_indexable(channels);
  int group_shift = 0;
  while (kBlock << group_shift < geometry.group_size) ++group_shift;
  const NormPayload payload{arguments.codes,
                            arguments.act_codes,
                            static_cast<const uint8_t*>(arguments.ranges),
                            channels.row_numel(),
                            static_cast<uint32_t>(geometry.blocks_per_row()),
                            static_cast<uint32_t>(geometry.groups_per_row()),
                            group_shift,
                            static_cast<int>(arguments.bits),
                            static_cast<int>(arguments.act_bits),
                            arguments.act_passing_bits(),
                            DitherSource(arguments.drawn, geometry)};
  const bool blocks = channels.row_numel() % kBlock == 0 &&
                      (channels.last ? channels.count % kBlock == 0
                                     : channels.plane >= kBlock) &&
                      is_aligned(grad_output.const_data_ptr(), 16) &&
                      is_aligned(arguments.codes, 4) &&
                      is_aligned(arguments.act_codes, 4);
  const bool whole_groups = channels.row_numel() % geometry.group_size == 0;
  return {channels, payload, current_stream(), blocks, whole_groups};
}

// Calls `body` with the width of the codes and the elements of a piece as
// constants.
template <typename Body>
void dispatch_pieces(const Call& call, const Body& body) {
  const int bits = call.payload.bits;
  const bool same = bits == call.payload.act_bits;
  if (!call.blocks) {
    body(Constant<kAnyBits>{}, Constant<1>{});
  } else if (same && bits == 2) {
    body(Constant<2>{}, Constant<kBlock>{});
  } else if (same && bits == 3) {
    body(Constant<3>{}, Constant<kBlock>{});
  } else if (same && bits == 4) {
    body(Constant<4>{}, Constant<kBlock>{});
  } else {
    body(Constant<kAnyBits>{}, Constant<kBlock>{});
  }
}

template <NormCodes kCodes>
void sum_gradients(const Memory& grad_output, const NormArguments& arguments,
                   const NormSums& sums) {
  const int64_t channels = arguments.channels.count;
  const SumsOutputs outputs(arguments.channels, sums);
  const Call call = make_call(grad_output, arguments);
  dispatch_dtype(grad_output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(grad_output.const_data_ptr());
    T* passed = static_cast<T*>(sums.grad.mutable_data_ptr());
    dispatch_pieces(call, [&](auto width, auto items) {
      constexpr int kBits = decltype(width)::value;
      constexpr int kItems = decltype(items)::value;
      const auto launch = [&](const Splits& splits, const auto& kernel) {
        if (splits.count == 1) {
          kernel(nullptr);
          check_launch();
          return;
        }
        const Workspace partial(int64_t{splits.count} * 2 * channels);
        float* target = partial.data();
        kernel(target);
        check_launch();
        finish_sums_kernel<<<finish_grid(2 * channels), kFinishThreads, 0,
                             call.stream>>>(target, outputs, splits.count);
        check_launch();
      };
      if (call.channels.last) {
        const Columns columns = make_columns<kItems>(
            call.channels, call.whole_groups, kResident<kBits, 4>);
        launch(columns.splits, [&](float* target) {
          column_sums_kernel<T, kBits, kCodes, kItems>
              <<<columns.grid(), kThreads, 0, call.stream>>>(
                  source, passed, target, outputs, call.payload, columns);
        });
      } else {
        const Planes planes = make_planes<kItems>(call.channels);
        launch(planes.splits, [&](float* target) {
          plane_sums_kernel<T, kBits, kCodes, kItems>
              <<<planes.grid(channels), kThreads, 0, call.stream>>>(
                  source, passed, target, outputs, call.payload, planes);
        });
      }
    });
  });
}

template <NormCodes kCodes>
void gradients(const Memory& grad_output, const NormArguments& arguments,
               const NormFactors& factors, const Memory& output) {
  const NormVectors vectors{factors.scale, factors.means,
                            arguments.channels.count};
  const Call call = make_call(grad_output, arguments);
  dispatch_dtype(grad_output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(grad_output.const_data_ptr());
    T* target = static_cast<T*>(output.mutable_data_ptr());
    dispatch_pieces(call, [&](auto width, auto items) {
      constexpr int kBits = decltype(width)::value;
      constexpr int kItems = decltype(items)::value;
      if (call.channels.last) {
        const Columns columns = make_columns<kItems>(
            call.channels, call.whole_groups, kResident<kBits, 3>);
        column_grad_kernel<T, kBits, kCodes, kItems>
            <<<columns.grid(), kThreads, 0, call.stream>>>(
                source, target, call.payload, vectors, columns);
        check_launch();
        return;
      }
      // Rows at a time that 32-bit indices can count.
      const int64_t row_pieces = call.channels.row_numel() / kItems;
      const int64_t max_rows = kMaxIndex / row_pieces;
      for (int64_t row = 0; row < call.channels.rows; row += max_rows) {
        const int64_t pieces =
            std::min(max_rows, call.channels.rows - row) * row_pieces;
        constexpr int64_t kStep = int64_t{kThreads} * kFactoredAtOnce<kItems>;
        NormPayload payload = call.payload;
        const int64_t blocks = row * payload.row_blocks;
        payload.codes += blocks * payload.bits;
        payload.dither = payload.dither.advanced(blocks);
        payload.ranges += row * payload.row_groups * sizeof(uint32_t) *
                          (kCodes == NormCodes::kSplit ? 2 : 1);
        plane_grad_kernel<T, kBits, kCodes, kItems>
            <<<static_cast<unsigned int>((pieces + kStep - 1) / kStep),
               kThreads, 0, call.stream>>>(
                source + row * payload.row_numel,
                target + row * payload.row_numel, payload, vectors,
                static_cast<uint32_t>(pieces),
                Divider(static_cast<uint32_t>(row_pieces)),
                Divider(static_cast<uint32_t>(call.channels.plane)));
        check_launch();
      }
    });
  });
}

}  // namespace

namespace cuda {

void norm_grad_sums(const Memory& grad_output, const NormArguments& arguments,
                    const NormSums& sums) {
  if (arguments.rotated()) {
    return rotated::norm_grad_sums(grad_output, arguments, sums);
  }
  dispatch_codes(arguments.kind, [&](auto codes) {
    sum_gradients<decltype(codes)::value>(grad_output, arguments, sums);
  });
}

void norm_grad_input(const Memory& grad_output, const NormArguments& arguments,
                     const NormFactors& factors, const Memory& grad_input) {
  if (arguments.rotated()) {
    return rotated::norm_grad_input(grad_output, arguments, factors,
                                    grad_input);
  }
  if (arguments.kind == NormCodes::kSplit) {
    gradients<NormCodes::kSplit>(grad_output, arguments, factors, grad_input);
  } else {
    gradients<NormCodes::kPlain>(grad_output, arguments, factors, grad_input);
  }
}

}  // namespace cuda
}  // namespace mmactnn
