//! libkakeya: the C ABI of the KAKEYA codec.
//!
//! What C and C++ callers see is `csrc/include/kakeya.h`; cbindgen writes it from the doc comments
//! of this crate (`cargo run -p kakeya-ffi --example write_header`), so the book that a stranger
//! programs from and the code that answers him cannot drift apart. `docs/c-abi.md` says why the
//! conventions are what they are.
//!
//! The codec itself (`crates/codec`) is safe Rust over slices. This crate is the only place where
//! raw pointers become slices, and it does that once per argument, after `checks` has refused what
//! could not be a valid one: NULL, misaligned, overflowing, overlapping.
//!
//! One file per noun, in the order in which a caller meets them.

// The names of the ABI are C names; giving Rust types other names would only add a translation
// table that a reader has to keep in mind.
#![allow(non_camel_case_types)]
// What a caller of an entry point must keep is the same for all of them and stated once, under
// "Memory" at the top of the header; a "# Safety" section on each would repeat it in the book.
#![allow(clippy::missing_safety_doc)]
#![deny(unsafe_op_in_unsafe_fn)]
#![warn(missing_docs)]
#![warn(clippy::undocumented_unsafe_blocks)]

mod checks;
mod driver;
mod kernels;
mod launch;
mod panic;
mod tensor;
mod text;

mod attend;
mod codec;
mod cuda;
mod dtype;
mod error;
mod layout;
mod open;
mod recipe;
mod seal;
mod status;
mod version;
mod write;

pub use attend::{
    KAKEYA_ATTEND_SEALED_PREFILL, kakeya_attend, kakeya_attend_args, kakeya_attend_options,
    kakeya_attend_with,
};
pub use codec::{
    kakeya_codec, kakeya_codec_describe, kakeya_codec_free, kakeya_codec_new, kakeya_codec_page_bytes,
    kakeya_codec_require_fingerprint,
};
pub use cuda::{
    kakeya_cuda, kakeya_cuda_append, kakeya_cuda_archs, kakeya_cuda_attend, kakeya_cuda_attend_args,
    kakeya_cuda_attend_with, kakeya_cuda_buffers, kakeya_cuda_free, kakeya_cuda_limits, kakeya_cuda_new,
    kakeya_cuda_open, kakeya_cuda_open_args, kakeya_cuda_plan, kakeya_cuda_plan_args,
    kakeya_cuda_require_options, kakeya_cuda_seal, kakeya_cuda_sizes, kakeya_cuda_write_args,
};
pub use dtype::kakeya_dtype;
pub use error::kakeya_last_error;
pub use layout::{kakeya_codec_page_layout, kakeya_page_layout};
pub use open::kakeya_open;
pub use recipe::{kakeya_recipe_describe, kakeya_recipe_list, kakeya_recipe_page_bytes};
pub use seal::{kakeya_seal, kakeya_seal_args};
pub use status::{kakeya_status, kakeya_status_name};
pub use version::{
    KAKEYA_ABI_VERSION, KAKEYA_BLOCK_TOKENS, kakeya_abi_version, kakeya_require_abi, kakeya_simd,
    kakeya_version,
};
pub use write::{kakeya_write, kakeya_write_args};
