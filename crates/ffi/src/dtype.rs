//! Element types of K, V, Q and outputs.

use crate::error::{Outcome, refuse};
use crate::status::kakeya_status::*;

/// Type of the elements of q, k, v, out and open_blocks.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum kakeya_dtype {
    /// bfloat16, 2 bytes.
    KAKEYA_DTYPE_BF16 = 0,
    /// IEEE half precision, 2 bytes.
    KAKEYA_DTYPE_F16 = 1,
    /// IEEE single precision, 4 bytes.
    KAKEYA_DTYPE_F32 = 2,
}

use kakeya_dtype::*;

impl kakeya_dtype {
    /// Reads the dtype field of a struct: a number, because the caller may have put anything there.
    pub(crate) fn from_number(number: u32) -> Outcome<Self> {
        for dtype in [KAKEYA_DTYPE_BF16, KAKEYA_DTYPE_F16, KAKEYA_DTYPE_F32] {
            if dtype as u32 == number {
                return Ok(dtype);
            }
        }
        refuse!(KAKEYA_ERR_BAD_DTYPE, "dtype is {number}; valid: 0 (bf16), 1 (f16), 2 (f32)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_frozen() {
        assert_eq!(kakeya_dtype::from_number(0).unwrap(), KAKEYA_DTYPE_BF16);
        assert_eq!(kakeya_dtype::from_number(1).unwrap(), KAKEYA_DTYPE_F16);
        assert_eq!(kakeya_dtype::from_number(2).unwrap(), KAKEYA_DTYPE_F32);
        assert_eq!(kakeya_dtype::from_number(3).unwrap_err().status, KAKEYA_ERR_BAD_DTYPE);
    }
}
