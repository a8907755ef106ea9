#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../common/divider.h"
#include "../common/pool.h"
#include "launch.h"
#include "packed_block.h"
#include "words.h"

namespace mmactnn {
namespace {

// Location of an element in a tensor [outer, height, width, inner].
struct Place {
  int32_t outer;
  int32_t row;
  int32_t column;
  int32_t inner;
};

// Finds the place of an index below 2^31.
struct Locator {
  Divider height;
  Divider width;
  Divider inner;

  __device__ __forceinline__ Place operator()(uint32_t index) const {
    const uint32_t pixel = inner.quotient(index);
    const uint32_t line = width.quotient(pixel);
    const uint32_t plane = height.quotient(line);
    return {static_cast<int32_t>(plane),
            static_cast<int32_t>(line - plane * height.divisor),
            static_cast<int32_t>(pixel - line * width.divisor),
            static_cast<int32_t>(index - pixel * inner.divisor)};
  }
};

// Constants of all launches of an op.
struct Layout {
  Pool pool;
  Locator locate;
  int32_t input_plane;
  int32_t output_plane;
  bool pairs;  // two elements of the input from an even one on are aligned
};

// An output a thread; neighbours share a byte of indices.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pool_kernel(const T* __restrict__ input, T* __restrict__ output,
                uint8_t* __restrict__ indices, Layout layout, uint32_t count) {
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  // Whole warps stay: the shuffle below names every lane of the warp.
  const bool active = index < count;
  uint32_t tap = 0;
  if (active) {
    const Place at = layout.locate(index);
    const auto maximum = find_maximum<T, Number<T>, int32_t>(
        input + at.outer * layout.input_plane + at.inner, layout.pool, at.row,
        at.column);
    output[index] = maximum.value;
    tap = maximum.tap;
  }
  const uint32_t next = __shfl_down_sync(0xFFFFFFFFu, tap, 1);
  if (active && index % 2 == 0) {
    indices[index / 2] = static_cast<uint8_t>(tap | (next << 4));
  }
}

// An element of the input a thread.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const T* __restrict__ grad_output,
                  const uint8_t* __restrict__ indices,
                  T* __restrict__ grad_input, Layout layout, uint32_t count) {
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= count) return;
  const Place at = layout.locate(index);
  grad_input[index] = gather_gradient<T, Number<T>, int32_t>(
      grad_output, indices, layout.pool,
      at.outer * layout.output_plane + at.inner, at.row, at.column);
}

// A square window without dilation that the compiler knows.
template <int kSize, int kStep, int kPad>
struct FixedWindow {
  static constexpr int kKernel = kSize;
  static constexpr int kStride = kStep;
  static constexpr int kPadding = kPad;

  static bool matches(const PoolAxis& axis) {
    return axis.kernel == kKernel && axis.stride.divisor == kStride &&
           axis.padding == kPadding && axis.dilation.divisor == 1;
  }
};

// That of the stem of residual networks.
using StemWindow = FixedWindow<3, 2, 1>;

// The taps of kItems outputs side by side, 4 bits each.
template <int kItems>
using TapWord = UnsignedInt<(kItems + 1) / 2>;

// kItems elements side by side, of neighbouring channels.
template <typename T, int kItems>
using Items = Vector<T, kItems>;

// The largest of the taps of a window so far.
struct Winner {
  float value;
  uint32_t tap;

  __device__ __forceinline__ void include(float other, uint32_t other_tap) {
    // The second is for NaN.
    const bool wins = other > value || other != other;
    value = wins ? other : value;
    tap = wins ? other_tap : tap;
  }
};

// kItems outputs a thread, one pixel's.
template <typename T, typename Window, int kItems>
__global__ void __launch_bounds__(kThreads)
    fixed_pool_kernel(const T* __restrict__ input, T* __restrict__ output,
                      uint8_t* __restrict__ indices, Layout layout,
                      uint32_t count) {
  constexpr int kKernel = Window::kKernel;
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  // Whole warps stay, see pool_kernel().
  const bool active = index < count;
  const Place at = layout.locate(active ? index : 0u);
  const int32_t height = layout.pool.height.input;
  const int32_t width = layout.pool.width.input;
  const int32_t inner = static_cast<int32_t>(layout.pool.inner);
  const int32_t first_row = at.row * Window::kStride - Window::kPadding;
  const int32_t first_column = at.column * Window::kStride - Window::kPadding;
  const T* source = input + at.outer * layout.input_plane + at.inner * kItems;
  // All reads first; elements outside are never larger than others.
  Items<T, kItems> items[kKernel][kKernel];
#pragma unroll
  for (int i = 0; i < kKernel; ++i) {
#pragma unroll
    for (int j = 0; j < kKernel; ++j) {
      const int32_t row = first_row + i;
      const int32_t column = first_column + j;
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        items[i][j].item[k] = Number<T>::store(-INFINITY);
      }
      if (row >= 0 && row < height && column >= 0 && column < width) {
        items[i][j] = *reinterpret_cast<const Items<T, kItems>*>(
            source + (row * width + column) * inner);
      }
    }
  }
  // The first element inside wins if there is nothing but -inf.
  const uint32_t first = static_cast<uint32_t>(max(-first_row, 0) * kKernel +
                                               max(-first_column, 0));
  Items<T, kItems> result;
  uint32_t taps = 0;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    Winner best{-INFINITY, first};
#pragma unroll
    for (int i = 0; i < kKernel; ++i) {
#pragma unroll
      for (int j = 0; j < kKernel; ++j) {
        best.include(Number<T>::load(items[i][j].item[k]), i * kKernel + j);
      }
    }
    result.item[k] = Number<T>::store(best.value);
    taps |= best.tap << (4 * k);
  }
  if (active) {
    reinterpret_cast<Items<T, kItems>*>(output)[index] = result;
  }
  if constexpr (kItems == 1) {
    const uint32_t next = __shfl_down_sync(0xFFFFFFFFu, active ? taps : 0u, 1);
    if (active && index % 2 == 0) {
      indices[index / 2] = static_cast<uint8_t>(taps | (next << 4));
    }
  } else if (active) {
    reinterpret_cast<TapWord<kItems>*>(indices)[index] =
        static_cast<TapWord<kItems>>(taps);
  }
}

// The outputs of a thread that lie side by side in a line, above a block of the
// input's.
template <typename Window>
constexpr int kLineOutputs = kBlock / Window::kStride;

// kLineOutputs outputs a thread, of one channel.
template <typename T, typename Window>
__global__ void __launch_bounds__(kThreads)
    line_pool_kernel(const T* __restrict__ input, T* __restrict__ output,
                     uint8_t* __restrict__ indices, Layout layout,
                     uint32_t count) {
  constexpr int kKernel = Window::kKernel;
  constexpr int kOutputs = kLineOutputs<Window>;
  // Windows begin at most one element before the block, and end within it.
  static_assert(Window::kPadding == 1 && kKernel - 1 <= Window::kStride);
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= count) return;
  const Place at = layout.locate(index);
  const int32_t height = layout.pool.height.input;
  const int32_t width = layout.pool.width.input;
  const int32_t first_row = at.row * Window::kStride - Window::kPadding;
  const bool left = at.column != 0;
  const T* source = input + at.outer * layout.input_plane + at.column * kBlock;
  // All reads first, see fixed_pool_kernel(). For taps outside another element
  // is read and ignored.
  PackedBlock<T> blocks[kKernel];
  T before[kKernel];
  bool inside[kKernel];
#pragma unroll
  for (int i = 0; i < kKernel; ++i) {
    const int32_t row = first_row + i;
    inside[i] = row >= 0 && row < height;
    const T* line = source + min(max(row, 0), height - 1) * width;
    blocks[i].load(line);
    before[i] = line[left ? -1 : 0];
  }
  const uint32_t first_line = max(-first_row, 0) * kKernel;
  Items<T, kOutputs> result;
  uint32_t taps = 0;
#pragma unroll
  for (int k = 0; k < kOutputs; ++k) {
    Winner best{-INFINITY, first_line + (k == 0 && !left ? 1u : 0u)};
#pragma unroll
    for (int i = 0; i < kKernel; ++i) {
#pragma unroll
      for (int j = 0; j < kKernel; ++j) {
        const int item = k * Window::kStride - Window::kPadding + j;
        const float value =
            item < 0 ? Number<T>::load(before[i]) : blocks[i].get(item);
        const bool held = inside[i] && (item >= 0 || left);
        best.include(held ? value : -INFINITY, i * kKernel + j);
      }
    }
    result.item[k] = Number<T>::store(best.value);
    taps |= best.tap << (4 * k);
  }
  reinterpret_cast<Items<T, kOutputs>*>(output)[index] = result;
  reinterpret_cast<TapWord<kOutputs>*>(indices)[index] =
      static_cast<TapWord<kOutputs>>(taps);
}

// kLineOutputs cells side by side a thread, see fixed_gather_kernel().
template <typename T, typename Window>
__global__ void __launch_bounds__(kThreads)
    line_gather_kernel(const T* __restrict__ grad_output,
                       const uint8_t* __restrict__ indices,
                       T* __restrict__ grad_input, Layout layout,
                       uint32_t count) {
  constexpr int kKernel = Window::kKernel;
  constexpr int kStride = Window::kStride;
  constexpr int kOutputs = kLineOutputs<Window>;
  // An element is in windows of its cell's number and of the next.
  constexpr int kLines = 2;
  static_assert(Window::kPadding == 1 && kKernel - 1 == kStride);
  constexpr uint32_t kNoTap = 15u;
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= count) return;
  const Place at = layout.locate(index);
  const int32_t outputs = layout.pool.width.output;
  const bool right = (at.column + 1) * kOutputs < outputs;
  float grads[kLines][kOutputs + 1];
  uint32_t taps[kLines];  // 4 bits for each of the windows
#pragma unroll
  for (int i = 0; i < kLines; ++i) {
    const bool inside = at.row + i < layout.pool.height.output;
    const int32_t row = inside ? at.row + i : layout.pool.height.output - 1;
    const int32_t first =
        at.outer * layout.output_plane + row * outputs + at.column * kOutputs;
    const int32_t last = first + (right ? kOutputs : 0);
    const auto items =
        *reinterpret_cast<const Items<T, kOutputs>*>(grad_output + first);
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
      grads[i][k] = Number<T>::load(items.item[k]);
    }
    grads[i][kOutputs] = Number<T>::load(grad_output[last]);
    taps[i] = *reinterpret_cast<const TapWord<kOutputs>*>(indices + first / 2) |
              (right ? indices[last / 2] & 15u : kNoTap) << (4 * kOutputs);
    if (!inside) taps[i] = 0xFFFFFFFFu;
  }
#pragma unroll
  for (int r = 0; r < kStride; ++r) {
    const int32_t row = at.row * kStride + r;
    if (row >= layout.pool.height.input) continue;
    float sums[kBlock];
#pragma unroll
    for (int c = 0; c < kBlock; ++c) {
      sums[c] = 0.0f;
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int window = c / kStride + j;
          const int row_tap = r + Window::kPadding - kStride * i;
          const int column_tap = c + Window::kPadding - kStride * window;
          if (row_tap < 0 || column_tap < 0) continue;
          const uint32_t tap = row_tap * kKernel + column_tap;
          if ((taps[i] & (15u << (4 * window))) == tap << (4 * window)) {
            sums[c] = add(sums[c], grads[i][window]);
          }
        }
      }
    }
    PackedBlock<T> block;
    block.set(sums);
    block.store(grad_input + at.outer * layout.input_plane +
                row * layout.pool.width.input + at.column * kBlock);
  }
}

// A cell of kStride by kStride elements of the input a thread, kItems channels
// of each: elements of a cell share most of their windows.
template <typename T, typename Window, int kItems>
__global__ void __launch_bounds__(kThreads)
    fixed_gather_kernel(const T* __restrict__ grad_output,
                        const uint8_t* __restrict__ indices,
                        T* __restrict__ grad_input, Layout layout,
                        uint32_t count) {
  constexpr int kKernel = Window::kKernel;
  constexpr int kStride = Window::kStride;
  constexpr int kPadding = Window::kPadding;
  // The windows of a cell, counted from that of the same number.
  constexpr int kFirst = -((kKernel - 1 - kPadding) / kStride);
  constexpr int kWindows = (kStride - 1 + kPadding) / kStride - kFirst + 1;
  constexpr uint32_t kNoTaps = 0xFFFFFFFFu;
  static_assert(kPadding < kKernel && kKernel * kKernel < 16);

  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= count) return;
  const Place at = layout.locate(index);
  const int32_t inner = static_cast<int32_t>(layout.pool.inner);
  const int32_t channel = at.inner * kItems;
  Items<T, kItems> grads[kWindows][kWindows];
  uint32_t taps[kWindows][kWindows];
#pragma unroll
  for (int i = 0; i < kWindows; ++i) {
#pragma unroll
    for (int j = 0; j < kWindows; ++j) {
      const int32_t row = at.row + kFirst + i;
      const int32_t column = at.column + kFirst + j;
      taps[i][j] = kNoTaps;
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        grads[i][j].item[k] = Number<T>::store(0.0f);
      }
      if (row < 0 || row >= layout.pool.height.output || column < 0 ||
          column >= layout.pool.width.output) {
        continue;
      }
      const int32_t output = at.outer * layout.output_plane +
                             (row * layout.pool.width.output + column) * inner +
                             channel;
      grads[i][j] =
          *reinterpret_cast<const Items<T, kItems>*>(grad_output + output);
      const uint8_t* bytes = indices + (output >> 1);
      if constexpr (kItems == 1) {
        taps[i][j] = *bytes >> ((output & 1) * 4) & 15u;
      } else {
        taps[i][j] = *reinterpret_cast<const TapWord<kItems>*>(bytes);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kStride; ++r) {
    Items<T, kItems> sums[kStride];
#pragma unroll
    for (int c = 0; c < kStride; ++c) {
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kWindows; ++i) {
#pragma unroll
          for (int j = 0; j < kWindows; ++j) {
            const int row_tap = r + kPadding - kStride * (kFirst + i);
            const int column_tap = c + kPadding - kStride * (kFirst + j);
            if (row_tap < 0 || row_tap >= kKernel || column_tap < 0 ||
                column_tap >= kKernel) {
              continue;
            }
            const uint32_t tap = row_tap * kKernel + column_tap;
            if ((taps[i][j] & (15u << (4 * k))) == tap << (4 * k)) {
              sum = add(sum, Number<T>::load(grads[i][j].item[k]));
            }
          }
        }
        sums[c].item[k] = Number<T>::store(sum);
      }
    }
    const int32_t row = at.row * kStride + r;
    const int32_t column = at.column * kStride;
    const int32_t width = layout.pool.width.input;
    if (row >= layout.pool.height.input) continue;
    T* target = grad_input + at.outer * layout.input_plane +
                (row * width + column) * inner + channel;
    if (kItems == 1 && kStride == 2 && layout.pairs) {
      *reinterpret_cast<Items<T, 2>*>(target) = {sums[0].item[0],
                                                 sums[kStride - 1].item[0]};
      continue;
    }
#pragma unroll
    for (int c = 0; c < kStride; ++c) {
      if (column + c < width) {
        *reinterpret_cast<Items<T, kItems>*>(target + c * inner) = sums[c];
      }
    }
  }
}

// Calls `body(layout, first, count)` for as many planes at a time as 32-bit
// indices can count. There are `height` * `width` * `inner` threads a plane.
template <typename Body>
void for_each_launch(const Pool& pool, int32_t height, int32_t width,
                     int64_t inner, bool pairs, const Body& body) {
  const int64_t plane = std::max(pool.input_plane(), pool.output_plane());
  // A multiple of kThreads less than the limit, for the threads past the end.
  int64_t planes = (kMaxIndex - kThreads) / plane;
  STD_TORCH_CHECK(planes >= std::min<int64_t>(pool.outer, 2),
                  "a plane (of channels_last tensors: a sample) may have at "
                  "most ",
                  (kMaxIndex - kThreads) / 2, " elements, got ", plane);
  // An even number, so that no two launches share a byte of indices.
  if (planes > 1) planes -= planes % 2;
  const Layout layout{pool,
                      {Divider(static_cast<uint32_t>(height)),
                       Divider(static_cast<uint32_t>(width)),
                       Divider(static_cast<uint32_t>(inner))},
                      static_cast<int32_t>(pool.input_plane()),
                      static_cast<int32_t>(pool.output_plane()),
                      pairs};
  for (int64_t first = 0; first < pool.outer; first += planes) {
    const int64_t count = std::min(planes, pool.outer - first);
    body(layout, first, static_cast<uint32_t>(count * height * width * inner));
  }
}

// Calls `body` with the elements of a thread as a Constant, 16 bytes of
// neighbouring channels where all of them are aligned.
template <typename T, typename Body>
void dispatch_items(const Pool& pool, const T* input, const T* output,
                    const uint8_t* indices, const Body& body) {
  constexpr int kItems = 16 / sizeof(T);
  if (pool.inner % kItems == 0 && is_aligned(input, 16) &&
      is_aligned(output, 16) && is_aligned(indices, kItems / 2)) {
    body(Constant<kItems>{});
  } else {
    body(Constant<1>{});
  }
}

// Whether lines are of whole blocks, a window for each step of them.
template <typename T, typename Window>
bool has_lines(const Pool& pool, const T* input, const T* output,
               const uint8_t* indices) {
  return pool.inner == 1 && pool.width.input % kBlock == 0 &&
         pool.width.output * Window::kStride == pool.width.input &&
         is_aligned(input, 16) && is_aligned(output, 16) &&
         is_aligned(indices, kLineOutputs<Window> / 2);
}

bool is_stem(const Pool& pool) {
  return StemWindow::matches(pool.height) && StemWindow::matches(pool.width);
}

unsigned int grid_size(uint32_t count) {
  return (count + kThreads - 1) / kThreads;
}

}  // namespace

namespace cuda {

void max_pool2d(const Memory& input, const Memory& output,
                const Memory& indices, const Pool& pool) {
  const cudaStream_t stream = current_stream();
  auto* index_bytes = static_cast<uint8_t*>(indices.mutable_data_ptr());
  dispatch_dtype(input.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(input.const_data_ptr());
    T* target = static_cast<T*>(output.mutable_data_ptr());
    // `across` threads for a line of a channel.
    const auto launch = [&](auto items, int32_t across, const auto& kernel) {
      for_each_launch(
          pool, pool.height.output, across, pool.inner / decltype(items)::value,
          false, [&](const Layout& layout, int64_t first, uint32_t count) {
            const int64_t first_output = first * pool.output_plane();
            kernel<<<grid_size(count), kThreads, 0, stream>>>(
                source + first * pool.input_plane(), target + first_output,
                index_bytes + first_output / 2, layout, count);
            check_launch();
          });
    };
    const int32_t width = pool.width.output;
    if (!is_stem(pool)) return launch(Constant<1>{}, width, pool_kernel<T>);
    if (has_lines<T, StemWindow>(pool, source, target, index_bytes)) {
      return launch(Constant<1>{}, width / kLineOutputs<StemWindow>,
                    line_pool_kernel<T, StemWindow>);
    }
    dispatch_items(pool, source, target, index_bytes, [&](auto items) {
      launch(items, width,
             fixed_pool_kernel<T, StemWindow, decltype(items)::value>);
    });
  });
}

void max_pool2d_backward(const Memory& grad_output, const Memory& indices,
                         const Memory& grad_input, const Pool& pool) {
  const cudaStream_t stream = current_stream();
  const auto* index_bytes =
      static_cast<const uint8_t*>(indices.const_data_ptr());
  dispatch_dtype(grad_output.dtype(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* source = static_cast<const T*>(grad_output.const_data_ptr());
    T* target = static_cast<T*>(grad_input.mutable_data_ptr());
    // A thread for every `height` by `width` elements of a channel.
    const auto launch = [&](auto items, int32_t height, int32_t width,
                            const auto& kernel) {
      const bool pairs = pool.inner == 1 && pool.width.input % 2 == 0 &&
                         is_aligned(target, 2 * sizeof(T));
      for_each_launch(
          pool, (pool.height.input + height - 1) / height,
          (pool.width.input + width - 1) / width,
          pool.inner / decltype(items)::value, pairs,
          [&](const Layout& layout, int64_t first, uint32_t count) {
            const int64_t first_output = first * pool.output_plane();
            kernel<<<grid_size(count), kThreads, 0, stream>>>(
                source + first_output, index_bytes + first_output / 2,
                target + first * pool.input_plane(), layout, count);
            check_launch();
          });
    };
    constexpr int32_t kStride = StemWindow::kStride;
    if (!is_stem(pool)) return launch(Constant<1>{}, 1, 1, gather_kernel<T>);
    // The two pairs of a cell of float32 are words wide enough.
    if (sizeof(T) == 2 &&
        has_lines<T, StemWindow>(pool, target, source, index_bytes)) {
      return launch(Constant<1>{}, kStride, kBlock,
                    line_gather_kernel<T, StemWindow>);
    }
    dispatch_items(pool, target, source, index_bytes, [&](auto items) {
      launch(items, kStride, kStride,
             fixed_gather_kernel<T, StemWindow, decltype(items)::value>);
    });
  });
}

}  // namespace cuda
}  // namespace mmactnn
