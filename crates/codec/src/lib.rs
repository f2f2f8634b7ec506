//! KAKEYA's codec: the format of compressed KV pages and everything that reads or writes them on a CPU.
//!
//! A page holds the keys and values of one KV head for one block of 128 tokens in a fixed number of bytes. The life of a
//! key: [`step::write`] puts it raw into its sequence's open block; the write that fills the block seals it
//! ([`Codec::seal`]); [`step::attend`] reads sealed pages as codes and open blocks raw. `docs/codec.md` tells why the
//! format is as it is, `docs/page-format.md` its every byte.
//!
//! Two implementations: [`reference`] reads like the document and is the oracle; [`fast`] gives the same bytes with SIMD.

#![deny(unsafe_code)]

pub mod attend;
pub mod calibration;
pub mod codec;
pub mod device;
pub mod error;
pub mod fast;
pub mod fragments;
pub mod grid;
pub mod hadamard;
pub mod layout;
pub mod page;
pub mod recipe;
pub mod reference;
pub mod rotary;
pub mod rows;
pub mod shape;
pub mod simd;
pub mod stats;
pub mod step;
pub mod trellis;
pub mod unit;
pub mod widths;

pub use codec::Codec;
pub use error::{Error, ErrorKind, Result};
pub use layout::PageLayout;
pub use recipe::{Quantizer, Recipe};
pub use rows::{Elements, ElementsMut, Rows, Tensor};
pub use shape::{BLOCK, ModelShape, Rope};

/// Instruction set that run-time dispatch chose: `portable`, `avx2` or `avx512`.
pub fn simd_level() -> &'static str {
    simd::name()
}
