//! Status codes: the one value that every fallible function returns.
//!
//! Numbers are part of the ABI. A number is never given a second meaning and never reused after a
//! code is retired; new codes take new numbers.

use std::ffi::{CStr, c_char};

use crate::panic::text_or_empty;

/// What a call came to. Numbers are frozen: a number keeps its meaning in every later version.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum kakeya_status {
    /// Done.
    KAKEYA_OK = 0,
    /// A pointer that must point to something is NULL.
    KAKEYA_ERR_NULL_POINTER = 1,
    /// A pointer is not a multiple of the size of what it points to.
    KAKEYA_ERR_MISALIGNED = 2,
    /// A buffer is shorter than what has to be written into it or read from it.
    KAKEYA_ERR_BUFFER_TOO_SMALL = 3,
    /// Lengths and strides describe more bytes than an address space holds.
    KAKEYA_ERR_OVERFLOW = 4,
    /// An index, a count, a position or a stride is outside its range.
    KAKEYA_ERR_OUT_OF_RANGE = 5,
    /// struct_size is not the sizeof of the struct in this header.
    KAKEYA_ERR_BAD_STRUCT_SIZE = 6,
    /// A text is not UTF-8.
    KAKEYA_ERR_BAD_UTF8 = 7,
    /// A recipe is neither the name of a preset nor a valid recipe in JSON.
    KAKEYA_ERR_BAD_RECIPE = 8,
    /// The description of the model is not valid.
    KAKEYA_ERR_BAD_MODEL = 9,
    /// The calibration artefact is not one, or is damaged.
    KAKEYA_ERR_BAD_CALIBRATION = 10,
    /// The recipe needs a calibration artefact and none was given.
    KAKEYA_ERR_CALIBRATION_REQUIRED = 11,
    /// The calibration artefact belongs to another model or another recipe.
    KAKEYA_ERR_CALIBRATION_MISMATCH = 12,
    /// Valid, but not something this version can do.
    KAKEYA_ERR_UNSUPPORTED = 13,
    /// K or V contains a NaN, an infinity or a magnitude above 2^24 where a block is sealed.
    KAKEYA_ERR_NON_FINITE = 14,
    /// The bytes of a page are not a page of this codec and layer.
    KAKEYA_ERR_BAD_PAGE = 15,
    /// A block is only partly there and has no slot in open_blocks.
    KAKEYA_ERR_NO_OPEN_SLOT = 16,
    /// Two arguments share memory, and one of them is written.
    KAKEYA_ERR_ALIASED = 17,
    /// dtype is not a kakeya_dtype.
    KAKEYA_ERR_BAD_DTYPE = 18,
    /// The library was built without CUDA kernels, or without ones for this GPU or shape.
    KAKEYA_ERR_NO_KERNELS = 19,
    /// There is no CUDA driver, or it does not start.
    KAKEYA_ERR_NO_CUDA = 20,
    /// The CUDA driver refused a call; the text says which and why.
    KAKEYA_ERR_CUDA = 21,
    /// The caller, a page or a calibration artefact is of another version than this library.
    KAKEYA_ERR_WRONG_VERSION = 22,
    /// A device that is not there, or memory that is not the device's.
    KAKEYA_ERR_WRONG_DEVICE = 23,
    /// Pages of another recipe, model or artefact than the codec's: their fingerprints differ.
    KAKEYA_ERR_WRONG_RECIPE = 24,
    /// A bug in this library. The process goes on; please report the text of kakeya_last_error().
    /// The one status after which outputs may have been written in part.
    KAKEYA_ERR_PANIC = 99,
}

use kakeya_status::*;

/// Every code with its name. The test below keeps this and the enum the same.
const NAMES: [(kakeya_status, &CStr); 26] = [
    (KAKEYA_OK, c"KAKEYA_OK"),
    (KAKEYA_ERR_NULL_POINTER, c"KAKEYA_ERR_NULL_POINTER"),
    (KAKEYA_ERR_MISALIGNED, c"KAKEYA_ERR_MISALIGNED"),
    (KAKEYA_ERR_BUFFER_TOO_SMALL, c"KAKEYA_ERR_BUFFER_TOO_SMALL"),
    (KAKEYA_ERR_OVERFLOW, c"KAKEYA_ERR_OVERFLOW"),
    (KAKEYA_ERR_OUT_OF_RANGE, c"KAKEYA_ERR_OUT_OF_RANGE"),
    (KAKEYA_ERR_BAD_STRUCT_SIZE, c"KAKEYA_ERR_BAD_STRUCT_SIZE"),
    (KAKEYA_ERR_BAD_UTF8, c"KAKEYA_ERR_BAD_UTF8"),
    (KAKEYA_ERR_BAD_RECIPE, c"KAKEYA_ERR_BAD_RECIPE"),
    (KAKEYA_ERR_BAD_MODEL, c"KAKEYA_ERR_BAD_MODEL"),
    (KAKEYA_ERR_BAD_CALIBRATION, c"KAKEYA_ERR_BAD_CALIBRATION"),
    (KAKEYA_ERR_CALIBRATION_REQUIRED, c"KAKEYA_ERR_CALIBRATION_REQUIRED"),
    (KAKEYA_ERR_CALIBRATION_MISMATCH, c"KAKEYA_ERR_CALIBRATION_MISMATCH"),
    (KAKEYA_ERR_UNSUPPORTED, c"KAKEYA_ERR_UNSUPPORTED"),
    (KAKEYA_ERR_NON_FINITE, c"KAKEYA_ERR_NON_FINITE"),
    (KAKEYA_ERR_BAD_PAGE, c"KAKEYA_ERR_BAD_PAGE"),
    (KAKEYA_ERR_NO_OPEN_SLOT, c"KAKEYA_ERR_NO_OPEN_SLOT"),
    (KAKEYA_ERR_ALIASED, c"KAKEYA_ERR_ALIASED"),
    (KAKEYA_ERR_BAD_DTYPE, c"KAKEYA_ERR_BAD_DTYPE"),
    (KAKEYA_ERR_NO_KERNELS, c"KAKEYA_ERR_NO_KERNELS"),
    (KAKEYA_ERR_NO_CUDA, c"KAKEYA_ERR_NO_CUDA"),
    (KAKEYA_ERR_CUDA, c"KAKEYA_ERR_CUDA"),
    (KAKEYA_ERR_WRONG_VERSION, c"KAKEYA_ERR_WRONG_VERSION"),
    (KAKEYA_ERR_WRONG_DEVICE, c"KAKEYA_ERR_WRONG_DEVICE"),
    (KAKEYA_ERR_WRONG_RECIPE, c"KAKEYA_ERR_WRONG_RECIPE"),
    (KAKEYA_ERR_PANIC, c"KAKEYA_ERR_PANIC"),
];

/// The name of a status, such as "KAKEYA_ERR_NULL_POINTER"; "KAKEYA_ERR_UNKNOWN" for a number that
/// is no status. Static text, never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn kakeya_status_name(status: i32) -> *const c_char {
    text_or_empty(|| {
        // Taken as a number: a Rust enum that holds any other bit pattern would be undefined behaviour.
        NAMES
            .iter()
            .find(|(code, _)| *code as i32 == status)
            .map_or(c"KAKEYA_ERR_UNKNOWN", |(_, name)| name)
            .as_ptr()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers as published in ABI 1. Do not edit lines here; add lines.
    #[test]
    fn numbers_and_names_are_frozen() {
        let published = [
            (0, "KAKEYA_OK"),
            (1, "KAKEYA_ERR_NULL_POINTER"),
            (2, "KAKEYA_ERR_MISALIGNED"),
            (3, "KAKEYA_ERR_BUFFER_TOO_SMALL"),
            (4, "KAKEYA_ERR_OVERFLOW"),
            (5, "KAKEYA_ERR_OUT_OF_RANGE"),
            (6, "KAKEYA_ERR_BAD_STRUCT_SIZE"),
            (7, "KAKEYA_ERR_BAD_UTF8"),
            (8, "KAKEYA_ERR_BAD_RECIPE"),
            (9, "KAKEYA_ERR_BAD_MODEL"),
            (10, "KAKEYA_ERR_BAD_CALIBRATION"),
            (11, "KAKEYA_ERR_CALIBRATION_REQUIRED"),
            (12, "KAKEYA_ERR_CALIBRATION_MISMATCH"),
            (13, "KAKEYA_ERR_UNSUPPORTED"),
            (14, "KAKEYA_ERR_NON_FINITE"),
            (15, "KAKEYA_ERR_BAD_PAGE"),
            (16, "KAKEYA_ERR_NO_OPEN_SLOT"),
            (17, "KAKEYA_ERR_ALIASED"),
            (18, "KAKEYA_ERR_BAD_DTYPE"),
            (19, "KAKEYA_ERR_NO_KERNELS"),
            (20, "KAKEYA_ERR_NO_CUDA"),
            (21, "KAKEYA_ERR_CUDA"),
            (22, "KAKEYA_ERR_WRONG_VERSION"),
            (23, "KAKEYA_ERR_WRONG_DEVICE"),
            (24, "KAKEYA_ERR_WRONG_RECIPE"),
            (99, "KAKEYA_ERR_PANIC"),
        ];
        assert_eq!(NAMES.len(), published.len());
        for (number, name) in published {
            // SAFETY: the function returns static NUL-terminated text.
            let got = unsafe { CStr::from_ptr(kakeya_status_name(number)) };
            assert_eq!(got.to_str().unwrap(), name);
            let (code, _) = NAMES.iter().find(|(code, _)| *code as i32 == number).unwrap();
            assert_eq!(format!("{code:?}"), name);
        }
    }

    #[test]
    fn unknown_numbers_have_a_name_too() {
        for number in [-1, 25, 98, 100, i32::MAX, i32::MIN] {
            // SAFETY: the function returns static NUL-terminated text.
            let got = unsafe { CStr::from_ptr(kakeya_status_name(number)) };
            assert_eq!(got, c"KAKEYA_ERR_UNKNOWN");
        }
    }
}
