//! KAKEYA's codec: the format of compressed KV pages and everything that reads or writes them on a CPU.
//!
//! A page holds the keys and values of one KV head for one block of 128 tokens in a fixed number of bytes. The life of a
//! key: [`step::write`] puts it raw into its sequence's open block; the write that fills the block seals it
//! ([`Codec::seal`]); [`step::attend`] reads sealed pages as codes and open blocks raw. `docs/codec.md` tells why the
//! format is as it is, `docs/page-format.md` its every byte.
//!
//! Two implementations: [`reference`] reads like the document and is the oracle; [`fast`] gives the same bytes with SIMD.

//!
//! ```
//! use kakeya_codec::{BLOCK, Codec, ModelShape, Recipe, Rows};
//!
//! let shape = ModelShape {
//!     num_layers: 1,
//!     num_kv_heads: 1,
//!     num_q_heads: 4,
//!     head_dim: 64,
//!     max_position: 4096,
//!     rope: None, // or the model's angles: keys come after rotary embedding
//! };
//! // A recipe that needs no calibration; the others take an artefact's bytes as the last argument.
//! let codec = Codec::new(&Recipe::parse("kakeya-free-4.6x")?, &shape, None)?;
//!
//! // Keys and values of one head and one block: 128 rows of 64 channels, K then V, 32 KiB in bf16.
//! let k: Vec<f32> = (0..BLOCK * 64).map(|i| (i as f32 * 0.37).sin()).collect();
//! let v: Vec<f32> = (0..BLOCK * 64).map(|i| (i as f32 * 0.73).cos()).collect();
//! let mut page = vec![0; codec.page_bytes()];
//! let (layer, head, block) = (0, 0, 5); // the sixth block of its sequence
//! codec.seal(layer, head, block, Rows::dense(&k, 64), Rows::dense(&v, 64), &mut page)?;
//! assert_eq!(page.len(), 7120); // 4.6 times less than bf16
//!
//! let (mut k_back, mut v_back) = (vec![0.0; k.len()], vec![0.0; v.len()]);
//! codec.open(layer, head, &page, &mut k_back, &mut v_back)?;
//! let error = |a: &[f32], b: &[f32]| -> f32 {
//!     let square = |x: f32| x * x;
//!     let norm: f32 = a.iter().map(|x| square(*x)).sum();
//!     (a.iter().zip(b).map(|(x, y)| square(x - y)).sum::<f32>() / norm).sqrt()
//! };
//! assert!(error(&k, &k_back) < 0.2 && error(&v, &v_back) < 0.5);
//! # Ok::<(), kakeya_codec::Error>(())
//! ```

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
