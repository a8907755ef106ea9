// Payload of a chain's input: format, encoding and decoding.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../ops/call.h"
#include "plan.h"

namespace mmactnn {

// Kinds of payloads, in `formats` of the ops.
enum class PayloadKind : int64_t {
  kNone = -1,
  kPlain = 0,
  kRows = 1,
  kSplit = 2,
  kZeroed = 3
};

// `bits` are bits a code; for kRows their sum over all samples, which is only
// used to encode.
struct Format {
  PayloadKind kind;
  int64_t bits;
  int64_t group_size;

  // Number of tensors in the payload.
  size_t num_saved() const {
    switch (kind) {
      case PayloadKind::kNone:
        return 0;
      case PayloadKind::kPlain:
      case PayloadKind::kZeroed:
        return 2;
      case PayloadKind::kRows:
      case PayloadKind::kSplit:
        return 4;
    }
    STD_TORCH_CHECK(false, "the payload kind of an input must be -1 to 3, got ",
                    static_cast<int64_t>(kind));
  }
};

// Reads the formats of a number of inputs.
inline std::vector<Format> read_formats(const std::vector<int64_t>& formats,
                                        size_t inputs) {
  STD_TORCH_CHECK(formats.size() == inputs * 3,
                  "formats must be kind, bits and group size of each of ",
                  inputs, " inputs, got ", formats.size(), " numbers");
  std::vector<Format> result;
  for (size_t n = 0; n < formats.size(); n += 3) {
    result.push_back(
        {static_cast<PayloadKind>(formats[n]), formats[n + 1], formats[n + 2]});
  }
  return result;
}

// An argument of ops that is left out.
inline const std::optional<Tensor> kNoTensor;

// Random bits of codes.
struct Draw {
  enum class Kind : int64_t { kNone = 0, kDither = 1, kRotated = 2 };

  Kind kind = Kind::kNone;
  int64_t seed = 0;
  int64_t offset = 0;

  bool rotated() const { return kind == Kind::kRotated; }
  // Argument of the ops that decode.
  std::vector<int64_t> drawn() const {
    if (kind == Kind::kNone) return {};
    return {seed, offset, 0, rotated() ? 1 : 0};
  }
  // That of the second payload of a step, see CountedStream::second().
  Draw second() const {
    return {kind, seed,
            static_cast<int64_t>(static_cast<uint64_t>(offset) ^
                                 (uint64_t{1} << 63))};
  }
};

// Of all inputs and steps; of an empty list codes alone are decoded.
inline std::vector<Draw> read_draws(const std::vector<int64_t>& draws,
                                    size_t count) {
  if (draws.empty()) return std::vector<Draw>(count);
  STD_TORCH_CHECK(draws.size() == count * 3,
                  "draws must be three numbers for each of ", count,
                  " inputs and steps, or empty, got ", draws.size());
  std::vector<Draw> result;
  for (size_t n = 0; n < draws.size(); n += 3) {
    STD_TORCH_CHECK(draws[n] >= 0 && draws[n] <= 2,
                    "the kind of a draw must be 0 (none), 1 (dither) or 2 "
                    "(rotated), got ",
                    draws[n]);
    result.push_back(
        {static_cast<Draw::Kind>(draws[n]), draws[n + 1], draws[n + 2]});
  }
  return result;
}

// Rounds an input: codes, ranges, and the widths of rows.
inline std::vector<Tensor> encode(const Tensor& input, const Format& format,
                                  int64_t seed, int64_t offset, bool rotated) {
  if (format.kind == PayloadKind::kPlain) {
    const auto [codes, ranges] = call<Tensor, Tensor>(
        "mmactnn::quantize", input, format.bits, format.group_size, seed,
        offset, kNoTensor, rotated);
    return {codes, ranges};
  }
  STD_TORCH_CHECK(format.kind == PayloadKind::kRows,
                  "an input can be encoded as kind 0 (plain) or 1 (rows), got ",
                  static_cast<int64_t>(format.kind));
  const auto [energies] =
      call<Tensor>("mmactnn::sample_range_energy", input, format.group_size);
  const auto [bits, starts] = call<Tensor, Tensor>(
      "mmactnn::allocate_sample_bits", energies, format.bits);
  const auto [codes, ranges] = call<Tensor, Tensor>(
      "mmactnn::quantize_rows", input, bits, starts, format.bits,
      format.group_size, seed, offset, kNoTensor, rotated);
  return {codes, ranges, bits, starts};
}

// Decodes a payload from encode() or from the layer that made the input.
inline Tensor decode(const std::optional<Tensor>* codes, const Format& format,
                     const Layout& layout, ScalarType dtype, const Draw& draw) {
  STD_TORCH_CHECK(format.kind != PayloadKind::kNone,
                  "nothing is kept of an input that a convolution read");
  const size_t needed = format.kind == PayloadKind::kRows ? 4 : 2;
  for (size_t i = 0; i < needed; ++i) {
    STD_TORCH_CHECK(codes[i], "codes and ranges of an input are missing");
  }
  switch (format.kind) {
    case PayloadKind::kPlain:
      return std::get<0>(call<Tensor>("mmactnn::dequantize", *codes[0],
                                      *codes[1], layout.sizes, layout.strides,
                                      dtype, format.bits, format.group_size,
                                      draw.drawn(), kNoTensor));
    case PayloadKind::kRows:
      return std::get<0>(
          call<Tensor>("mmactnn::dequantize_rows", *codes[0], *codes[1],
                       *codes[2], *codes[3], layout.sizes, layout.strides,
                       dtype, format.group_size, draw.drawn(), kNoTensor));
    case PayloadKind::kSplit:
      return std::get<0>(call<Tensor>(
          "mmactnn::dequantize_split", *codes[0], *codes[1], codes[2], codes[3],
          layout.sizes, layout.strides, dtype, format.bits, format.group_size,
          draw.drawn(), kNoTensor));
    case PayloadKind::kZeroed:
      return std::get<0>(call<Tensor>("mmactnn::dequantize_zeroed", *codes[0],
                                      *codes[1], layout.sizes, layout.strides,
                                      dtype, format.bits, format.group_size,
                                      draw.drawn(), kNoTensor));
    default:
      STD_TORCH_CHECK(false, "there is no such format");
  }
}

}  // namespace mmactnn
