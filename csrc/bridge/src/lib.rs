//! The kernels' device functions, compiled for the host. Test support only: nothing ships from here.

#[cxx::bridge(namespace = "kakeya")]
mod ffi {
    unsafe extern "C++" {
        include!("bridge.h");

        /// Codes `[16][32]` of a unit of `width` bits into its `64 * width` bytes.
        fn pack(width: usize, codes: &[u8], unit: &mut [u8]) -> Result<()>;
        /// Inverse of `pack`.
        fn unpack(width: usize, unit: &[u8], codes: &mut [u8]) -> Result<()>;
        /// Path bits and refinements `[16][32]` of a trellis unit of `width` bits into its `64 * width` bytes.
        fn pack_trellis(width: usize, path: &[u8], refinement: &[u8], unit: &mut [u8]) -> Result<()>;
        /// Symbols `[16][32]` of a trellis unit; `before` `[32]` carries the chains from unit to unit: the last three path
        /// bits at bits 27, 29 and 31.
        fn trellis_symbols(width: usize, unit: &[u8], before: &mut [u32], symbols: &mut [u8]) -> Result<()>;
        /// A unit as the attention kernels' operands, `[16][32]`. `quantizer`: 0 uniform, 1 cubic, 2 trellis; `narrow`: units of
        /// 16 channels; `before` `[32]` as in `trellis_symbols`; `gamma`: twice as fp16. Uniform codes come as numbers of code
        /// value, others in the scale of `kakeya_codec::fragments::alphabet`.
        fn dequantise(
            quantizer: u32,
            width: usize,
            narrow: bool,
            unit: &[u8],
            before: &[u32],
            gamma: u32,
            points: &mut [f32],
        ) -> Result<()>;
        /// Factor of the table of offsets that the attention kernels expect. `quantizer`: as in `dequantise`.
        fn table_scale(quantizer: u32) -> Result<f32>;
        /// Bit at which the attention kernels read a unit's uniform codes of a class of channels.
        fn uniform_code_bit(width: u32, channel_class: u32, narrow: bool) -> u32;
        /// tanh as the attention kernels with a soft cap take it.
        fn tanh_of(x: f32) -> f32;
        /// Seals a block from rows `[128][head_dim]` with the tables of `kakeya_codec::device::tables` (as words, for their
        /// alignment). `false`: a value was not finite, the page means nothing.
        fn seal(
            tables: &[u64],
            layer: u32,
            head: u32,
            block_index: u32,
            k: &[f32],
            v: &[f32],
            page: &mut [u8],
        ) -> Result<bool>;
        /// Opens a page into rows `[128][head_dim]`; NaN where it is none.
        fn open(
            tables: &[u64],
            layer: u32,
            head: u32,
            page: &[u8],
            k: &mut [f32],
            v: &mut [f32],
        ) -> Result<()>;
    }
}

pub use ffi::{
    dequantise, open, pack, pack_trellis, seal, table_scale, tanh_of, trellis_symbols, uniform_code_bit,
    unpack,
};
