//! Strided tensors of the caller: tokens by heads by channels, and blocks by heads of pages.
//!
//! A strided tensor is borrowed as one array from its first to its last element. For pages that
//! is more than the pages themselves when a serving engine interleaves layers; the header asks the
//! caller to leave the whole range alone during a call.

use std::borrow::Cow;
use std::ffi::c_void;

use ::kakeya_codec::{Elements, ElementsMut};
use half::{bf16, f16};

use crate::checks::{Extent, Region, within};
use crate::dtype::kakeya_dtype::{self, *};
use crate::error::{Outcome, refuse};
use crate::status::kakeya_status::*;
use crate::version::KAKEYA_BLOCK_TOKENS;

/// One dimension of a strided tensor: how many steps, and how far a step goes.
#[derive(Clone, Copy, Debug)]
struct Dim {
    count: usize,
    stride: usize,
}

/// Refuses negative strides; they would reach before the pointer.
fn stride(name: &str, dimension: &str, stride: i64) -> Outcome<usize> {
    match usize::try_from(stride) {
        Ok(stride) => Ok(stride),
        Err(_) => refuse!(
            KAKEYA_ERR_OUT_OF_RANGE,
            "{dimension} stride of {name} is {stride}; valid: 0 or more (negative strides are not supported)"
        ),
    }
}

/// Length from the first to the last element of rows of `row` elements; 0 if there are no rows.
fn span(name: &str, dims: [Dim; 2], row: usize) -> Outcome<usize> {
    if dims.iter().any(|dim| dim.count == 0) {
        return Ok(0);
    }
    // Counts are below 2^32 and strides below 2^63, so u128 cannot overflow here.
    let reach: u128 = dims.iter().map(|dim| (dim.count - 1) as u128 * dim.stride as u128).sum();
    match usize::try_from(reach + row as u128) {
        Ok(span) => Ok(span),
        Err(_) => refuse!(
            KAKEYA_ERR_OVERFLOW,
            "{name}: {} by {} rows with strides {} and {} span more than an address space holds",
            dims[0].count,
            dims[1].count,
            dims[0].stride,
            dims[1].stride
        ),
    }
}

/// Refuses a written tensor whose rows run into each other. Either dimension may be the outer one; rows that
/// interleave in any other way are refused although some of them would not overlap.
fn rows_apart(name: &str, dimensions: [&str; 2], dims: [Dim; 2], row: usize) -> Outcome {
    // A dimension of one step has no stride to speak of.
    let mut steps: Vec<_> = dims.into_iter().zip(dimensions).filter(|(dim, _)| dim.count > 1).collect();
    steps.sort_by_key(|(dim, _)| dim.stride);
    let mut least = row as u128;
    for (dim, dimension) in steps {
        if (dim.stride as u128) < least {
            return refuse!(
                KAKEYA_ERR_OUT_OF_RANGE,
                "{dimension} stride of {name} is {}; valid: {least} or more, so that nothing is written twice",
                dim.stride
            );
        }
        least += (dim.count - 1) as u128 * dim.stride as u128;
    }
    Ok(())
}

/// An array of elements of one of the ABI's types.
#[derive(Debug)]
enum Array {
    Bf16(Region<bf16>),
    F16(Region<f16>),
    F32(Region<f32>),
}

impl Array {
    fn new(name: &'static str, dtype: kakeya_dtype, ptr: *const c_void, len: usize) -> Outcome<Self> {
        Ok(match dtype {
            KAKEYA_DTYPE_BF16 => Self::Bf16(Region::new(name, ptr.cast(), len)?),
            KAKEYA_DTYPE_F16 => Self::F16(Region::new(name, ptr.cast(), len)?),
            KAKEYA_DTYPE_F32 => Self::F32(Region::new(name, ptr.cast(), len)?),
        })
    }

    fn extent(&self) -> Extent {
        match self {
            Self::Bf16(region) => region.extent(),
            Self::F16(region) => region.extent(),
            Self::F32(region) => region.extent(),
        }
    }

    /// # Safety
    /// As [`Region::shared`].
    unsafe fn shared<'a>(&self) -> Elements<'a> {
        // SAFETY: promised by the caller; every bit pattern is a value of these types.
        unsafe {
            match self {
                Self::Bf16(region) => Elements::Bf16(region.shared()),
                Self::F16(region) => Elements::F16(region.shared()),
                Self::F32(region) => Elements::F32(region.shared()),
            }
        }
    }

    /// # Safety
    /// As [`Region::exclusive`].
    unsafe fn exclusive<'a>(&self) -> ElementsMut<'a> {
        // SAFETY: promised by the caller; every bit pattern is a value of these types.
        unsafe {
            match self {
                Self::Bf16(region) => ElementsMut::Bf16(region.exclusive()),
                Self::F16(region) => ElementsMut::F16(region.exclusive()),
                Self::F32(region) => ElementsMut::F32(region.exclusive()),
            }
        }
    }
}

/// A tensor `[tokens][heads][head_dim]`, strides in elements, head_dim contiguous.
#[derive(Debug)]
pub(crate) struct Tensor {
    array: Array,
    pub token_stride: usize,
    pub head_stride: usize,
}

impl Tensor {
    /// A tensor that is read. Its rows may overlap: stride 0 repeats a row.
    pub fn input(
        name: &'static str,
        dtype: kakeya_dtype,
        ptr: *const c_void,
        [tokens, heads, head_dim]: [usize; 3],
        [token_stride, head_stride]: [i64; 2],
    ) -> Outcome<Self> {
        let token_stride = stride(name, "token", token_stride)?;
        let head_stride = stride(name, "head", head_stride)?;
        let dims = [Dim { count: tokens, stride: token_stride }, Dim { count: heads, stride: head_stride }];
        let array = Array::new(name, dtype, ptr, span(name, dims, head_dim)?)?;
        Ok(Self { array, token_stride, head_stride })
    }

    /// A tensor that is written: its rows must lie apart.
    pub fn output(
        name: &'static str,
        dtype: kakeya_dtype,
        ptr: *mut c_void,
        shape: [usize; 3],
        strides: [i64; 2],
    ) -> Outcome<Self> {
        let tensor = Self::input(name, dtype, ptr, shape, strides)?;
        let dims = [
            Dim { count: shape[0], stride: tensor.token_stride },
            Dim { count: shape[1], stride: tensor.head_stride },
        ];
        rows_apart(name, ["token", "head"], dims, shape[2])?;
        Ok(tensor)
    }

    pub fn extent(&self) -> Extent {
        self.array.extent()
    }

    /// # Safety
    /// As [`Region::shared`].
    pub unsafe fn shared<'a>(&self) -> ::kakeya_codec::Tensor<'a> {
        // SAFETY: promised by the caller.
        let data = unsafe { self.array.shared() };
        ::kakeya_codec::Tensor { data, token_stride: self.token_stride, head_stride: self.head_stride }
    }

    /// # Safety
    /// As [`Region::exclusive`].
    pub unsafe fn exclusive<'a>(&self) -> ElementsMut<'a> {
        // SAFETY: promised by the caller.
        unsafe { self.array.exclusive() }
    }
}

/// The open blocks: `[num_open][K, V][num_heads][128][head_dim]`, contiguous.
#[derive(Debug)]
pub(crate) struct OpenBlocks(Array);

impl OpenBlocks {
    pub fn new(
        head_dim: usize,
        dtype: kakeya_dtype,
        ptr: *const c_void,
        num_open: u32,
        heads: usize,
    ) -> Outcome<Self> {
        // Slots are named by int32. Heads and head_dim are the model's, so the product stays far below 2^64.
        within("num_open", num_open.into(), 0, i32::MAX as u64)?;
        let block = 2 * heads * KAKEYA_BLOCK_TOKENS as usize * head_dim;
        Ok(Self(Array::new("open_blocks", dtype, ptr, num_open as usize * block)?))
    }

    pub fn extent(&self) -> Extent {
        self.0.extent()
    }

    /// # Safety
    /// As [`Region::shared`].
    pub unsafe fn shared<'a>(&self) -> Elements<'a> {
        // SAFETY: promised by the caller.
        unsafe { self.0.shared() }
    }

    /// # Safety
    /// As [`Region::exclusive`].
    pub unsafe fn exclusive<'a>(&self) -> ElementsMut<'a> {
        // SAFETY: promised by the caller.
        unsafe { self.0.exclusive() }
    }
}

/// `open_slot`: the slot in open_blocks of each block, or -1.
#[derive(Debug)]
pub(crate) struct OpenSlots {
    region: Region<i32>,
    blocks: usize,
}

impl OpenSlots {
    /// Without open blocks the map may be NULL.
    pub fn new(ptr: *const i32, num_open: u32, blocks: usize) -> Outcome<Self> {
        let len = if ptr.is_null() && num_open == 0 { 0 } else { blocks };
        Ok(Self { region: Region::new("open_slot", ptr, len)?, blocks })
    }

    pub fn extent(&self) -> Extent {
        self.region.extent()
    }

    /// The map, or one without a slot for any block where the caller gave none.
    ///
    /// # Safety
    /// As [`Region::shared`].
    pub unsafe fn shared<'a>(&self) -> Cow<'a, [i32]> {
        // SAFETY: promised by the caller.
        let slots = unsafe { self.region.shared() };
        if slots.len() < self.blocks { vec![-1; self.blocks].into() } else { slots.into() }
    }
}

/// `block_table`: rows of block ids, `stride` entries apart. Returns the stride too.
pub(crate) fn table(
    ptr: *const i32,
    rows: usize,
    columns: usize,
    row_stride: i64,
) -> Outcome<(Region<i32>, usize)> {
    let row_stride = stride("block_table", "row", row_stride)?;
    let dims = [Dim { count: rows, stride: row_stride }, Dim { count: 1, stride: 0 }];
    rows_apart("block_table", ["row", ""], dims, columns)?;
    Ok((Region::new("block_table", ptr, span("block_table", dims, columns)?)?, row_stride))
}

/// Pages `[num_blocks][num_heads]`, strides in bytes.
#[derive(Debug)]
pub(crate) struct Pages {
    pub region: Region<u8>,
    pub block_stride: usize,
    pub head_stride: usize,
}

impl Pages {
    /// Pages must lie apart even where they are only read: overlapping ones are never what was meant.
    pub fn new(
        ptr: *const u8,
        [blocks, heads, page_bytes]: [usize; 3],
        [block_stride, head_stride]: [i64; 2],
    ) -> Outcome<Self> {
        let block_stride = stride("pages", "block", block_stride)?;
        let head_stride = stride("pages", "head", head_stride)?;
        let dims = [Dim { count: blocks, stride: block_stride }, Dim { count: heads, stride: head_stride }];
        rows_apart("pages", ["block", "head"], dims, page_bytes)?;
        let region = Region::new("pages", ptr, span("pages", dims, page_bytes)?)?;
        Ok(Self { region, block_stride, head_stride })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOWHERE: *const c_void = std::ptr::without_provenance(1 << 20);

    #[test]
    fn the_span_ends_with_the_last_row() {
        let data = vec![0.0_f32; 2 * 1000 + 64 + 64];
        let tensor =
            Tensor::input("k", KAKEYA_DTYPE_F32, data.as_ptr().cast(), [3, 2, 64], [1000, 64]).unwrap();
        // SAFETY: the strides reach the last element of `data` and no further.
        assert_eq!(unsafe { tensor.shared() }.data.len(), data.len());
        let none = Tensor::input("k", KAKEYA_DTYPE_F32, std::ptr::null(), [0, 2, 64], [1000, 64]).unwrap();
        // SAFETY: an empty tensor is an empty slice.
        assert!(unsafe { none.shared() }.data.is_empty());
    }

    #[test]
    fn negative_and_endless_strides_are_refused() {
        let status = |strides| {
            Tensor::input("k", KAKEYA_DTYPE_BF16, NOWHERE, [128, 2, 64], strides).unwrap_err().status
        };
        assert_eq!(status([-1, 64]), KAKEYA_ERR_OUT_OF_RANGE);
        assert_eq!(status([128, i64::MIN]), KAKEYA_ERR_OUT_OF_RANGE);
        assert_eq!(status([i64::MAX, 64]), KAKEYA_ERR_OVERFLOW);
        assert_eq!(status([i64::MAX / 127, 64]), KAKEYA_ERR_OVERFLOW);
    }

    #[test]
    fn either_dimension_of_an_output_may_be_the_outer_one() {
        let make = |strides| Tensor::output("out", KAKEYA_DTYPE_F32, NOWHERE.cast_mut(), [5, 3, 64], strides);
        make([3 * 64, 64]).unwrap();
        make([64, 5 * 64]).unwrap();
        make([4 * 64, 65]).unwrap();
        for strides in [[3 * 64 - 1, 64], [64, 5 * 64 - 1], [192, 63], [64, 64], [0, 64]] {
            assert_eq!(make(strides).unwrap_err().status, KAKEYA_ERR_OUT_OF_RANGE, "{strides:?}");
        }
    }

    #[test]
    fn a_dimension_of_one_needs_no_stride() {
        Tensor::output("out", KAKEYA_DTYPE_F32, NOWHERE.cast_mut(), [1, 3, 64], [0, 64]).unwrap();
        Pages::new(NOWHERE.cast(), [1, 1, 96], [0, 0]).unwrap();
    }
}
