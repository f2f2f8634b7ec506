//! Why a call was refused: a status for programs and a text for people.
//!
//! The text lives per thread, so that two threads that fail at once read their own reasons.

use std::cell::RefCell;
use std::ffi::{CString, c_char};

use ::kakeya_codec::{Error as CodecError, ErrorKind};

use crate::panic::text_or_empty;
use crate::status::kakeya_status::{self, *};

/// A refusal on its way to the caller.
#[derive(Debug)]
pub(crate) struct Failure {
    pub status: kakeya_status,
    pub message: String,
}

/// What the body of an entry point returns.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    pub fn new(status: kakeya_status, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }
}

/// Shorthand for `Err(Failure::new(status, format!(..)))`.
macro_rules! refuse {
    ($status:expr, $($text:tt)+) => {
        Err($crate::error::Failure::new($status, format!($($text)+)))
    };
}
pub(crate) use refuse;

impl From<CodecError> for Failure {
    fn from(error: CodecError) -> Self {
        let status = match error.kind() {
            ErrorKind::BadRecipe => KAKEYA_ERR_BAD_RECIPE,
            ErrorKind::BadModel => KAKEYA_ERR_BAD_MODEL,
            ErrorKind::BadCalibration => KAKEYA_ERR_BAD_CALIBRATION,
            ErrorKind::CalibrationRequired => KAKEYA_ERR_CALIBRATION_REQUIRED,
            ErrorKind::CalibrationMismatch => KAKEYA_ERR_CALIBRATION_MISMATCH,
            ErrorKind::Unsupported => KAKEYA_ERR_UNSUPPORTED,
            ErrorKind::NonFinite => KAKEYA_ERR_NON_FINITE,
            ErrorKind::BadPage => KAKEYA_ERR_BAD_PAGE,
            ErrorKind::WrongVersion => KAKEYA_ERR_WRONG_VERSION,
            ErrorKind::OutOfRange => KAKEYA_ERR_OUT_OF_RANGE,
            ErrorKind::NoOpenSlot => KAKEYA_ERR_NO_OPEN_SLOT,
            ErrorKind::BufferTooSmall => KAKEYA_ERR_BUFFER_TOO_SMALL,
            ErrorKind::Overflow => KAKEYA_ERR_OVERFLOW,
        };
        Failure::new(status, error.to_string())
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Keeps `message` as the last error of this thread.
pub(crate) fn remember(message: &str) {
    // A NUL inside would cut the text short for a C reader; messages quote caller's text, so it can occur.
    let text = CString::new(message.replace('\0', "\u{fffd}")).unwrap_or_default();
    // A thread that is being torn down has no cell any more; then there is no one left to read the text.
    let _ = LAST_ERROR.try_with(|cell| *cell.borrow_mut() = text);
}

/// Why the last call that failed on this thread failed: UTF-8 text that names the argument, what
/// was wrong with it and what is valid. "" if none failed yet; never NULL. A call that succeeds
/// leaves the text as it is. The pointer is valid until the next call of this library on this
/// thread.
#[unsafe(no_mangle)]
pub extern "C" fn kakeya_last_error() -> *const c_char {
    text_or_empty(|| LAST_ERROR.try_with(|cell| cell.borrow().as_ptr()).unwrap_or(c"".as_ptr()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn text() -> String {
        // SAFETY: never NULL, NUL-terminated, and nothing on this thread replaces it before the copy.
        unsafe { CStr::from_ptr(kakeya_last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn each_thread_reads_its_own_text() {
        remember("mine");
        std::thread::spawn(|| {
            assert_eq!(text(), "");
            remember("theirs");
            assert_eq!(text(), "theirs");
        })
        .join()
        .unwrap();
        assert_eq!(text(), "mine");
    }

    #[test]
    fn a_nul_does_not_cut_the_text() {
        remember("a\0b");
        assert_eq!(text(), "a\u{fffd}b");
    }
}
