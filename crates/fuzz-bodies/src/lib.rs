//! Bodies of the fuzz targets: one function for each, from any bytes to "nothing is wrong", or a panic that says what is.
//!
//! `fuzz/` runs them under libFuzzer on a nightly compiler. They live in a crate of their own so that the stable compiler
//! checks them with everything else and `tests/replay.rs` runs them on every input that was kept. What each target looks
//! for is at the top of its file; `docs/testing.md` says how to run them.
//!
//! All of them are deterministic: the bytes alone decide what is done. Memory and time of an input are bounded by its
//! length, so that a slow input or one that takes much memory is a finding too.

mod abi;
mod attention;
mod calibration;
mod device;
mod model;
mod page;
mod recipe;
mod rows;
mod scalar_simd;
mod source;

#[path = "../../codec/tests/common/mod.rs"]
mod common;

pub use abi::abi;
pub use calibration::calibration;
pub use device::device;
pub use page::page;
pub use recipe::recipe;
pub use scalar_simd::scalar_simd;

/// A target: its name, which is that of its folders in `fuzz/corpus` and `fuzz/crashes`, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 6] = [
    ("recipe", recipe),
    ("calibration", calibration),
    ("page", page),
    ("abi", abi),
    ("scalar_simd", scalar_simd),
    ("device", device),
];

/// Whether two rows of numbers are the same to the bit. NaNs count as equal whatever their payload: which of two NaN operands
/// an instruction hands on is no part of the format.
pub(crate) fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len()
        && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()))
}
