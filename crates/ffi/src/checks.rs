//! What is checked of a pointer before it becomes a slice.
//!
//! An entry point works in three steps. It describes every array that it was given as a [`Region`]
//! (NULL, alignment and size are checked then), it refuses outputs that share memory with anything
//! else ([`disjoint`]), and only then it turns regions into slices. So the slices that reach the
//! codec obey Rust's rules for any caller that passes memory it really has.

use std::marker::PhantomData;
use std::mem::{align_of, size_of};

use crate::error::{Outcome, refuse};
use crate::status::kakeya_status::*;

/// Refuses NULL and misaligned pointers.
pub(crate) fn pointer<T>(name: &str, ptr: *const T) -> Outcome {
    if ptr.is_null() {
        return refuse!(KAKEYA_ERR_NULL_POINTER, "{name} is NULL");
    }
    if !ptr.is_aligned() {
        return refuse!(
            KAKEYA_ERR_MISALIGNED,
            "{name} is at {ptr:p}; valid: a multiple of {}",
            align_of::<T>()
        );
    }
    Ok(())
}

/// A struct of the ABI whose first field is `struct_size`.
///
/// # Safety
/// The type is `repr(C)`, starts with `struct_size: u32`, and every bit pattern is a valid value.
pub(crate) unsafe trait Sized32: Copy {
    /// Its name in the header.
    const NAME: &'static str;
}

/// Refuses a struct whose `struct_size` is not the one of this version, before reading any other field.
pub(crate) fn struct_size<T: Sized32>(name: &str, ptr: *const T) -> Outcome {
    pointer(name, ptr)?;
    // SAFETY: not NULL and aligned; the caller promises a struct of this ABI, which starts with a u32.
    // Only these four bytes are read, because an older caller's struct may be shorter than ours.
    let found = unsafe { ptr.cast::<u32>().read() };
    if found as usize != size_of::<T>() {
        return refuse!(
            KAKEYA_ERR_BAD_STRUCT_SIZE,
            "{name}->struct_size is {found}; valid: sizeof({}) = {}",
            T::NAME,
            size_of::<T>()
        );
    }
    Ok(())
}

/// Copies the arguments of a call. A copy, because the caller's struct may lie inside a buffer that is written.
pub(crate) fn arguments<T: Sized32>(ptr: *const T) -> Outcome<T> {
    arguments_named("args", ptr)
}

/// As [`arguments`], for a parameter of another name.
pub(crate) fn arguments_named<T: Sized32>(name: &str, ptr: *const T) -> Outcome<T> {
    struct_size(name, ptr)?;
    // SAFETY: not NULL, aligned, and struct_size says that the caller's struct is this one; every bit
    // pattern of it is valid (Sized32).
    Ok(unsafe { ptr.read() })
}

/// An array in the caller's memory: checked for NULL, alignment and size, not yet borrowed.
#[derive(Debug)]
pub(crate) struct Region<T> {
    pub name: &'static str,
    start: *mut T,
    len: usize,
    element: PhantomData<T>,
}

impl<T> Region<T> {
    /// An array of `len` elements. An empty one needs no pointer.
    pub fn new(name: &'static str, ptr: *const T, len: usize) -> Outcome<Self> {
        if len > 0 {
            pointer(name, ptr)?;
        }
        let region = Self { name, start: ptr.cast_mut(), len, element: PhantomData };
        // isize::MAX: the size of an object in Rust as in C; also the sum with the address must not wrap.
        let fits = len
            .checked_mul(size_of::<T>())
            .filter(|bytes| *bytes <= isize::MAX as usize)
            .and_then(|bytes| region.address().checked_add(bytes));
        match fits {
            Some(_) => Ok(region),
            None => refuse!(
                KAKEYA_ERR_OVERFLOW,
                "{name} spans {len} elements of {} bytes, more than an address space holds",
                size_of::<T>()
            ),
        }
    }

    fn address(&self) -> usize {
        if self.len == 0 { 0 } else { self.start.addr() }
    }

    /// The bytes that the array covers, for [`disjoint`].
    pub fn extent(&self) -> Extent {
        let start = self.address();
        Extent { name: self.name, start, end: start + self.len * size_of::<T>() }
    }

    /// Borrows the array for reading.
    ///
    /// # Safety
    /// The caller of the ABI keeps the promise of the header: the array is there for the length of
    /// this call, and no one writes it meanwhile; this call does not write it ([`disjoint`]).
    pub unsafe fn shared<'a>(&self) -> &'a [T] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: not NULL, aligned, at most isize::MAX bytes (all checked in `new`); the rest is promised above.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    /// Borrows the array for writing.
    ///
    /// # Safety
    /// As [`Region::shared`], and nothing else of this call touches it ([`disjoint`]).
    pub unsafe fn exclusive<'a>(&self) -> &'a mut [T] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: as in `shared`; exclusive by the promise above.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

/// A named range of addresses, end exclusive.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    pub name: &'static str,
    pub start: usize,
    pub end: usize,
}

/// Refuses outputs that share a byte with another output or with an input. Inputs may overlap each other:
/// q, k and v are usually interleaved slices of one projection.
pub(crate) fn disjoint(outputs: &[Extent], inputs: &[Extent]) -> Outcome {
    for (i, out) in outputs.iter().enumerate() {
        for other in outputs[i + 1..].iter().chain(inputs) {
            if out.start < other.end && other.start < out.end {
                return refuse!(
                    KAKEYA_ERR_ALIASED,
                    "{} (bytes {:#x}..{:#x}) and {} (bytes {:#x}..{:#x}) overlap; valid: memory of its own for everything that is written",
                    out.name,
                    out.start,
                    out.end,
                    other.name,
                    other.start,
                    other.end
                );
            }
        }
    }
    Ok(())
}

/// Checks an index against its bound.
pub(crate) fn below(name: &str, value: u64, bound: u64) -> Outcome {
    match bound {
        0 => refuse!(KAKEYA_ERR_OUT_OF_RANGE, "{name} is {value}; there are none"),
        _ if value < bound => Ok(()),
        _ => refuse!(KAKEYA_ERR_OUT_OF_RANGE, "{name} is {value}; valid: 0..={}", bound - 1),
    }
}

/// Checks a count against its range, ends included.
pub(crate) fn within(name: &str, value: u64, least: u64, most: u64) -> Outcome {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    refuse!(KAKEYA_ERR_OUT_OF_RANGE, "{name} is {value}; valid: {least}..={most}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_misaligned_and_endless_arrays_are_refused() {
        let data = [0_u64; 4];
        let odd = data.as_ptr().wrapping_byte_add(1);
        let status = |r: Outcome<Region<u64>>| r.unwrap_err().status;
        assert_eq!(status(Region::new("a", std::ptr::null(), 1)), KAKEYA_ERR_NULL_POINTER);
        assert_eq!(status(Region::new("a", odd, 1)), KAKEYA_ERR_MISALIGNED);
        assert_eq!(status(Region::new("a", data.as_ptr(), usize::MAX)), KAKEYA_ERR_OVERFLOW);
        assert_eq!(status(Region::new("a", data.as_ptr(), isize::MAX as usize / 8 + 1)), KAKEYA_ERR_OVERFLOW);
        // Ends past the last address although it is short enough.
        let last = std::ptr::without_provenance::<u64>(usize::MAX - 7);
        assert_eq!(status(Region::new("a", last, 2)), KAKEYA_ERR_OVERFLOW);
    }

    #[test]
    fn an_empty_array_needs_no_pointer_and_overlaps_nothing() {
        let empty = Region::<u32>::new("empty", std::ptr::null(), 0).unwrap();
        let data = [0_u32; 4];
        let full = Region::new("full", data.as_ptr(), 4).unwrap();
        disjoint(&[empty.extent()], &[full.extent(), empty.extent()]).unwrap();
        // SAFETY: an empty region is an empty slice whatever its pointer.
        assert!(unsafe { empty.shared() }.is_empty());
    }

    #[test]
    fn neighbours_are_disjoint_and_a_shared_byte_is_not() {
        let data = [0_u8; 32];
        let part = |name, at: usize, len| Region::new(name, &raw const data[at], len).unwrap().extent();
        disjoint(&[part("a", 0, 16)], &[part("b", 16, 16)]).unwrap();
        let refused = disjoint(&[part("a", 0, 17)], &[part("b", 16, 16)]).unwrap_err();
        assert_eq!(refused.status, KAKEYA_ERR_ALIASED);
        assert!(refused.message.starts_with("a (bytes "), "{}", refused.message);
        // Two inputs may overlap.
        disjoint(&[], &[part("a", 0, 17), part("b", 16, 16)]).unwrap();
    }

    #[test]
    fn a_struct_of_another_size_is_refused_before_it_is_read() {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Args {
            struct_size: u32,
            rest: u64,
        }
        // SAFETY: repr(C), struct_size first, integers only.
        unsafe impl Sized32 for Args {
            const NAME: &'static str = "args_t";
        }
        let args = Args { struct_size: 8, rest: 7 };
        let refused = arguments(&raw const args).err().unwrap();
        assert_eq!(refused.status, KAKEYA_ERR_BAD_STRUCT_SIZE);
        assert_eq!(refused.message, "args->struct_size is 8; valid: sizeof(args_t) = 16");
        let args = Args { struct_size: 16, ..args };
        assert_eq!(arguments(&raw const args).unwrap().rest, 7);
    }
}
