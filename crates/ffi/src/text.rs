//! Text over the boundary: in as (pointer, length), out into the caller's buffer.

use std::ffi::c_char;

use crate::checks::{Region, disjoint, pointer};
use crate::error::{Outcome, refuse};
use crate::status::kakeya_status::*;

/// Borrows a text argument; it need not end in NUL.
///
/// # Safety
/// As [`Region::shared`].
pub(crate) unsafe fn text_in<'a>(name: &'static str, ptr: *const c_char, len: usize) -> Outcome<&'a str> {
    // An empty text is a caller's slip like any other NULL; the codec then says what is valid.
    pointer(name, ptr)?;
    let region = Region::new(name, ptr.cast::<u8>(), len)?;
    // SAFETY: promised by the caller of this function.
    let bytes = unsafe { region.shared() };
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(error) => refuse!(
            KAKEYA_ERR_BAD_UTF8,
            "{name} is not UTF-8: byte {} of {len} is {:#04x}",
            error.valid_up_to(),
            bytes[error.valid_up_to()]
        ),
    }
}

/// Hands out `text` with a terminating NUL: see "Text" in the header.
///
/// # Safety
/// `buf` and `needed` are NULL or point to `cap` bytes and a size_t that this call may write.
pub(crate) unsafe fn text_out(text: &str, buf: *mut c_char, cap: usize, needed: *mut usize) -> Outcome {
    pointer("needed", needed)?;
    if cap > 0 {
        pointer("buf", buf)?;
    }
    let size = text.len() + 1;
    let buffer = Region::new("buf", buf.cast::<u8>(), cap)?;
    disjoint(&[buffer.extent(), Region::new("needed", needed, 1)?.extent()], &[])?;
    // SAFETY: not NULL, aligned, and the caller's to write.
    unsafe { needed.write(size) };
    if cap < size {
        if buf.is_null() {
            return Ok(()); // asked for the size only
        }
        return refuse!(KAKEYA_ERR_BUFFER_TOO_SMALL, "buf holds {cap} bytes; {size} are needed");
    }
    // SAFETY: checked above; the caller's to write, and no other argument lies in it.
    let target = unsafe { buffer.exclusive() };
    target[..size - 1].copy_from_slice(text.as_bytes());
    target[size - 1] = 0;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::kakeya_status;

    fn out(text: &str, cap: usize) -> (Option<kakeya_status>, usize, Vec<u8>) {
        let (mut buf, mut needed) = (vec![0xAA_u8; cap], 0);
        // SAFETY: both live and as long as said.
        let outcome = unsafe { text_out(text, buf.as_mut_ptr().cast(), cap, &mut needed) };
        (outcome.err().map(|f| f.status), needed, buf)
    }

    #[test]
    fn a_short_buffer_stays_untouched_and_the_size_is_told() {
        assert_eq!(out("abc", 3), (Some(KAKEYA_ERR_BUFFER_TOO_SMALL), 4, vec![0xAA; 3]));
        assert_eq!(out("abc", 4), (None, 4, b"abc\0".to_vec()));
        assert_eq!(out("abc", 6), (None, 4, b"abc\0\xAA\xAA".to_vec()));
    }

    #[test]
    fn the_size_alone_can_be_asked() {
        let mut needed = 0;
        // SAFETY: no buffer, a live size.
        unsafe { text_out("abc", std::ptr::null_mut(), 0, &mut needed) }.unwrap();
        assert_eq!(needed, 4);
        // SAFETY: as above.
        let refused = unsafe { text_out("abc", std::ptr::null_mut(), 4, &mut needed) }.unwrap_err();
        assert_eq!(refused.status, KAKEYA_ERR_NULL_POINTER);
    }

    #[test]
    fn broken_utf8_is_named_by_its_byte() {
        let bytes = b"kak\xFFeya";
        // SAFETY: live and as long as said.
        let refused = unsafe { text_in("recipe", bytes.as_ptr().cast(), bytes.len()) }.unwrap_err();
        assert_eq!(refused.status, KAKEYA_ERR_BAD_UTF8);
        assert_eq!(refused.message, "recipe is not UTF-8: byte 3 of 7 is 0xff");
    }
}
