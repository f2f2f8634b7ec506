// What the bridge exposes of kernels/: units packed, unpacked and decoded by the device functions, on the host.
#pragma once

#include "rust/cxx.h"

namespace kakeya {

// Codes [16 positions][32 lanes] of a unit of `width` bits into its bytes, and back.
void pack(size_t width, rust::Slice<const uint8_t> codes, rust::Slice<uint8_t> unit);
void unpack(size_t width, rust::Slice<const uint8_t> unit, rust::Slice<uint8_t> codes);

// Path bits and refinements [16][32] of a trellis unit of `width` bits into its bytes.
void pack_trellis(size_t width, rust::Slice<const uint8_t> path, rust::Slice<const uint8_t> refinement,
                  rust::Slice<uint8_t> unit);

// Symbols [16][32] of a trellis unit of `width` bits; `before` [32]: the lanes' words of the chain's unit before,
// updated.
void trellis_symbols(size_t width, rust::Slice<const uint8_t> unit, rust::Slice<uint32_t> before,
                     rust::Slice<uint8_t> symbols);

// A unit as the attention kernels' operands, f32 [16][32]. `quantizer`: 0 uniform, 1 cubic, 2 trellis. `narrow`: units
// of 16 channels. `before` [32]: as trellis_symbols. `gamma`: twice as fp16. Uniform codes come times 2^(24 -
// code_bit).
void dequantise(uint32_t quantizer, size_t width, bool narrow, rust::Slice<const uint8_t> unit,
                rust::Slice<const uint32_t> before, uint32_t gamma, rust::Slice<float> points);

// Factor of the table of offsets that the attention kernels expect. `quantizer`: as dequantise.
float table_scale(uint32_t quantizer);

// Bit at which the attention kernels read a unit's uniform codes of a class of channels.
uint32_t uniform_code_bit(uint32_t width, uint32_t channel_class, bool narrow);

// tanh as the attention kernels with a soft cap take it.
float tanh_of(float x);

// Seals a block, the threads of each phase one after the other. False: a value was not finite.
bool seal(rust::Slice<const uint64_t> tables, uint32_t layer, uint32_t head, uint32_t block_index,
          rust::Slice<const float> k, rust::Slice<const float> v, rust::Slice<uint8_t> page);

// Opens a page into rows [128][head_dim]; NaN where it is none.
void open(rust::Slice<const uint64_t> tables, uint32_t layer, uint32_t head, rust::Slice<const uint8_t> page,
          rust::Slice<float> k, rust::Slice<float> v);

}  // namespace kakeya
