//! Which library this is: asked before anything else, by a caller that loaded it at run time.

use std::ffi::{CStr, c_char};

use crate::error::refuse;
use crate::panic::{boundary, number, text_or_empty};
use crate::status::kakeya_status::{self, *};

/// Version of the ABI that this header describes. Raised when a function or a struct changes its
/// meaning; functions, structs and status codes may be added without that.
pub const KAKEYA_ABI_VERSION: u32 = 1;

/// Tokens in a block. The page format and every function here count in blocks of this size.
pub const KAKEYA_BLOCK_TOKENS: u32 = 128;

/// The ABI version of the library that was loaded. Compare it with KAKEYA_ABI_VERSION of the header
/// that you compiled against, and refuse the library if they differ.
#[unsafe(no_mangle)]
pub extern "C" fn kakeya_abi_version() -> u32 {
    number(|| KAKEYA_ABI_VERSION)
}

/// OK if this library serves a caller that was compiled against the header of this version: pass
/// KAKEYA_ABI_VERSION. The first call of a program that loads the library at run time.
///
/// Errors: WRONG_VERSION.
#[unsafe(no_mangle)]
pub extern "C" fn kakeya_require_abi(version: u32) -> kakeya_status {
    boundary(|| {
        if version == KAKEYA_ABI_VERSION {
            return Ok(());
        }
        refuse!(
            KAKEYA_ERR_WRONG_VERSION,
            "the caller was compiled against version {version} of the C interface; this libkakeya speaks {KAKEYA_ABI_VERSION}"
        )
    })
}

/// The version of the library, such as "0.1.0". Static text.
#[unsafe(no_mangle)]
pub extern "C" fn kakeya_version() -> *const c_char {
    text_or_empty(|| {
        const TEXT: &CStr =
            match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
                Ok(text) => text,
                Err(_) => panic!("a package version has no NUL"),
            };
        TEXT.as_ptr()
    })
}

/// Which instructions run-time dispatch chose on this machine: "avx512", "avx2" or "portable".
/// Pages are the same bytes on all of them, attention the same up to rounding. KAKEYA_SIMD=portable or
/// avx2 in the environment asks for less than the processor offers. Static text.
#[unsafe(no_mangle)]
pub extern "C" fn kakeya_simd() -> *const c_char {
    text_or_empty(|| {
        match ::kakeya_codec::simd_level() {
            "avx512" => c"avx512",
            "avx2" => c"avx2",
            _ => c"portable",
        }
        .as_ptr()
    })
}
