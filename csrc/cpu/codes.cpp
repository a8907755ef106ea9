#include "codes.h"

#include <cstdint>

#include "../common/codec.h"
#include "../common/dispatch.h"

namespace mmactnn {
namespace {

template <int kBits>
void pack(const uint8_t* codes, int64_t blocks, uint8_t* packed) {
  for (int64_t block = 0; block < blocks; ++block) {
    uint64_t word = 0;
    for (int i = 0; i < kBlock; ++i) {
      word |= static_cast<uint64_t>(codes[block * kBlock + i]) << (i * kBits);
    }
    for (int byte = 0; byte < kBits; ++byte) {
      packed[block * kBits + byte] = static_cast<uint8_t>(word >> (8 * byte));
    }
  }
}

template <int kBits>
void unpack(const uint8_t* packed, int64_t blocks, uint8_t* codes) {
  for (int64_t block = 0; block < blocks; ++block) {
    uint64_t word = 0;
    for (int byte = 0; byte < kBits; ++byte) {
      word |= static_cast<uint64_t>(packed[block * kBits + byte]) << (8 * byte);
    }
    for (int i = 0; i < kBlock; ++i) {
      codes[block * kBlock + i] =
          static_cast<uint8_t>((word >> (i * kBits)) & max_code_of(kBits));
    }
  }
}

}  // namespace

void pack_codes(const uint8_t* codes, int64_t blocks, int bits,
                uint8_t* packed) {
  dispatch_bits(bits, [&](auto width) {
    pack<decltype(width)::value>(codes, blocks, packed);
  });
}

void unpack_codes(const uint8_t* packed, int64_t blocks, int bits,
                  uint8_t* codes) {
  dispatch_bits(bits, [&](auto width) {
    unpack<decltype(width)::value>(packed, blocks, codes);
  });
}

}  // namespace mmactnn
