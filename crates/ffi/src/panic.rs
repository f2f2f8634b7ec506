//! The boundary that every entry point runs behind: its body is one call of [`boundary`], [`release`], [`text_or_empty`] or
//! [`number`] (`tests/boundary.rs` reads the sources for it).
//!
//! Unwinding into C is undefined behaviour, and a serving engine must not die of a bug in a codec:
//! a panic becomes `KAKEYA_ERR_PANIC` with its text, and the process goes on.

use std::any::Any;
use std::ffi::c_char;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Outcome, remember};
use crate::status::kakeya_status::{self, KAKEYA_ERR_PANIC, KAKEYA_OK};

/// Runs the body of an entry point; turns its outcome into a status and keeps the text of a refusal.
pub(crate) fn boundary(body: impl FnOnce() -> Outcome) -> kakeya_status {
    // AssertUnwindSafe: the only state that outlives a call is the codec, which no call modifies, and
    // the caller's output buffers, whose contents the header leaves open after a panic.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => KAKEYA_OK,
        Ok(Err(failure)) => {
            remember(&failure.message);
            failure.status
        }
        Err(payload) => {
            remember(&format!("bug in libkakeya, please report: {}", text_of(payload.as_ref())));
            discard(payload);
            KAKEYA_ERR_PANIC
        }
    }
}

/// Runs the body of an entry point that returns no status. A panic stays as this thread's last error and goes no further.
pub(crate) fn release(body: impl FnOnce() -> Outcome) {
    let _ = boundary(body);
}

/// Runs the body of an entry point that returns a text; "" after a panic.
pub(crate) fn text_or_empty(body: impl FnOnce() -> *const c_char) -> *const c_char {
    // AssertUnwindSafe: as in `boundary`. The panic is not remembered: this may be kakeya_last_error itself.
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        discard(payload);
        c"".as_ptr()
    })
}

/// Runs the body of an entry point that returns a number; 0 after a panic.
pub(crate) fn number(body: impl FnOnce() -> u32) -> u32 {
    // AssertUnwindSafe: as in `boundary`.
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        discard(payload);
        0
    })
}

/// Drops what a panic carried. A payload whose own drop panics is left with what that carried: a few bytes lost once per
/// bug, for nothing that unwinds any further.
fn discard(payload: Box<dyn Any + Send>) {
    if let Err(second) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(second);
    }
}

fn text_of(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without text")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{kakeya_last_error, refuse};
    use crate::status::kakeya_status::KAKEYA_ERR_BAD_PAGE;
    use std::ffi::CStr;

    fn text() -> String {
        // SAFETY: never NULL, NUL-terminated, and nothing on this thread replaces it before the copy.
        unsafe { CStr::from_ptr(kakeya_last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_becomes_a_status_with_its_text() {
        assert_eq!(boundary(|| panic!("index {} of {}", 7, 3)), KAKEYA_ERR_PANIC);
        assert_eq!(text(), "bug in libkakeya, please report: index 7 of 3");
        assert_eq!(boundary(|| panic!("plain")), KAKEYA_ERR_PANIC);
        assert_eq!(text(), "bug in libkakeya, please report: plain");
        assert_eq!(boundary(|| std::panic::panic_any(7_u8)), KAKEYA_ERR_PANIC);
        assert_eq!(text(), "bug in libkakeya, please report: a panic without text");
    }

    #[test]
    fn a_payload_that_panics_when_dropped_goes_no_further() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                std::panic::panic_any(());
            }
        }
        // Both payloads are of no size: what is left behind holds no memory.
        assert_eq!(boundary(|| std::panic::panic_any(Bomb)), KAKEYA_ERR_PANIC);
    }

    #[test]
    fn entry_points_without_a_status_end_quietly() {
        release(|| panic!("while releasing"));
        assert_eq!(text(), "bug in libkakeya, please report: while releasing");
        // SAFETY: never NULL, NUL-terminated.
        assert_eq!(unsafe { CStr::from_ptr(text_or_empty(|| panic!("text"))) }, c"");
        assert_eq!(number(|| panic!("number")), 0);
        assert_eq!(number(|| 7), 7);
    }

    #[test]
    fn a_refusal_keeps_its_status_and_a_success_keeps_the_text() {
        assert_eq!(boundary(|| refuse!(KAKEYA_ERR_BAD_PAGE, "page {}", 3)), KAKEYA_ERR_BAD_PAGE);
        assert_eq!(boundary(|| Ok(())), KAKEYA_OK);
        assert_eq!(text(), "page 3");
    }
}
