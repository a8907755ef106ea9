// Philox4x32-7 and Philox2x32-7: counter-based random bits, the same on every
// device.
//
// J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.
// Seven rounds are the fewest that pass BigCrush there (Table 2); a rounding
// decision needs no more, and each round costs every element of a kernel.
#pragma once

#include <cstdint>

#include "portability.h"

namespace mmactnn {

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;

// Random stream of an op: `seed` is the key, `offset` the upper half of the
// counter. Each op defines its own use of the lower half.
struct PhiloxStream {
  uint64_t seed;
  uint64_t offset;
};

// The same for Philox2x32: its key, and bits of its counter above the lower
// half.
struct PairStream {
  uint32_t key;
  uint32_t counter;
};

// 64 bits that differ wherever `value` does (the finaliser of SplitMix64: G. L.
// Steele et al., "Fast splittable pseudorandom number generators", OOPSLA'14).
MMACTNN_HOST_DEVICE uint64_t mix64(uint64_t value) {
  value = (value ^ (value >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
  value = (value ^ (value >> 27)) * UINT64_C(0x94D049BB133111EB);
  return value ^ (value >> 31);
}

struct PhiloxBlock {
  uint32_t word[4];

  // 16 random bits for each of 8 elements `i`.
  MMACTNN_HOST_DEVICE uint32_t bits16(int i) const {
    return (word[i >> 1] >> ((i & 1) * 16)) & 0xFFFFu;
  }
};

// All 64 bits of a product. In assembly, because the compiler adds a zero to
// the upper half of an ordinary one.
MMACTNN_HOST_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

MMACTNN_HOST_DEVICE PhiloxBlock philox(PhiloxStream stream, uint64_t block) {
  uint32_t c0 = static_cast<uint32_t>(block);
  uint32_t c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream.offset);
  uint32_t c3 = static_cast<uint32_t>(stream.offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(stream.seed);
  uint32_t k1 = static_cast<uint32_t>(stream.seed >> 32);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = wide_product(kPhiloxMultiplier0, c0);
    const uint64_t p1 = wide_product(kPhiloxMultiplier1, c2);
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// Streams of one seed differ for all offsets: the map to 64 bits is one to one.
MMACTNN_HOST_DEVICE PairStream pair_stream(PhiloxStream stream) {
  constexpr uint64_t kGolden = UINT64_C(0x9E3779B97F4A7C15);
  const uint64_t mixed = mix64(stream.seed + (stream.offset + 1) * kGolden);
  return {static_cast<uint32_t>(mixed >> 32), static_cast<uint32_t>(mixed)};
}

// A stream whose offset is completed on the device: a CUDA graph repeats all
// numbers that it was captured with, and so counts in memory.
class CountedStream {
 public:
  CountedStream() = default;
  // `device_offset` is on the device of the op; null: 0.
  CountedStream(PhiloxStream first, const int64_t* device_offset)
      : first_(first),
        pair_(pair_stream(first)),
        device_offset_(device_offset) {}

  MMACTNN_HOST_DEVICE PhiloxStream current() const {
    uint64_t moved = 0;
    if (device_offset_ != nullptr) {
#ifdef __CUDA_ARCH__
      // In assembly, because the compiler would read it early and hold it in
      // registers until it is needed.
      asm volatile("ld.global.u64 %0, [%1];"
                   : "=l"(moved)
                   : "l"(device_offset_));
#else
      moved = static_cast<uint64_t>(*device_offset_);
#endif
    }
    return {first_.seed, first_.offset + moved};
  }
  MMACTNN_HOST_DEVICE PairStream current_pair() const {
    return device_offset_ == nullptr ? pair_ : pair_stream(current());
  }

  // A stream of its own for a second tensor of the same draw.
  CountedStream second() const {
    constexpr uint64_t kHighest = uint64_t{1} << 63;
    return {{first_.seed, first_.offset ^ kHighest}, device_offset_};
  }

 private:
  PhiloxStream first_{};
  PairStream pair_{};
  const int64_t* device_offset_ = nullptr;
};

struct PhiloxPair {
  uint32_t word[2];
};

constexpr uint32_t kPhiloxPairMultiplier = 0xD256D193u;

// Philox2x32 of a counter and a key.
MMACTNN_HOST_DEVICE PhiloxPair philox_pair(uint32_t c0, uint32_t c1,
                                           uint32_t key) {
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product = wide_product(kPhiloxPairMultiplier, c0);
    c0 = static_cast<uint32_t>(product >> 32) ^ key ^ c1;
    c1 = static_cast<uint32_t>(product);
    key += kPhiloxWeyl0;
  }
  return {{c0, c1}};
}

}  // namespace mmactnn
