//! Sealing whole blocks: K and V of 128 tokens become one page for each KV head.

use std::ffi::c_void;

use crate::checks::{Sized32, arguments, below, disjoint};
use crate::codec::{borrow, check_heads, check_layer, kakeya_codec};
use crate::dtype::kakeya_dtype;
use crate::panic::boundary;
use crate::status::kakeya_status;
use crate::tensor::{Pages, Tensor};
use crate::version::KAKEYA_BLOCK_TOKENS;

/// Arguments of kakeya_seal.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kakeya_seal_args {
    /// sizeof(kakeya_seal_args).
    pub struct_size: u32,
    /// Layer of the model.
    pub layer: u32,
    /// The first KV head of k, v and pages, counted in the whole model: not 0 on later
    /// tensor-parallel ranks.
    pub first_head: u32,
    /// KV heads of k, v and pages.
    pub num_heads: u32,
    /// A kakeya_dtype: type of the elements of k and v.
    pub dtype: u32,
    /// Position of the block's first token, divided by 128.
    pub block_index: u32,
    /// K after RoPE, [128][num_heads][head_dim].
    pub k: *const c_void,
    /// V, [128][num_heads][head_dim].
    pub v: *const c_void,
    /// Elements from a token of k to the next.
    pub k_token_stride: i64,
    /// Elements from a head of k to the next.
    pub k_head_stride: i64,
    /// Elements from a token of v to the next.
    pub v_token_stride: i64,
    /// Elements from a head of v to the next.
    pub v_head_stride: i64,
    /// Output: a page for each of num_heads heads.
    pub pages: *mut u8,
    /// Bytes from a head's page to the next; at least the bytes of a page.
    pub page_head_stride: i64,
}

// SAFETY: repr(C), struct_size first, integers and raw pointers only.
unsafe impl Sized32 for kakeya_seal_args {
    const NAME: &'static str = "kakeya_seal_args";
}

/// Seals one whole block. The same values give the same bytes as kakeya_write gives for them, in
/// whatever pieces they arrive there.
///
/// Errors: BAD_STRUCT_SIZE, BAD_DTYPE, OUT_OF_RANGE (layer, heads, block_index, strides), ALIASED,
/// NON_FINITE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_seal(
    codec: *const kakeya_codec,
    args: *const kakeya_seal_args,
) -> kakeya_status {
    boundary(|| {
        let args = arguments(args)?;
        // SAFETY: the header asks for a codec that is not released during the call.
        let codec = unsafe { borrow(codec) }?;
        check_layer(codec.shape(), args.layer)?;
        check_heads(codec.shape(), args.first_head, "num_heads", args.num_heads)?;
        let dtype = kakeya_dtype::from_number(args.dtype)?;
        below("block_index", args.block_index.into(), codec.shape().max_blocks() as u64)?;

        let shape = [KAKEYA_BLOCK_TOKENS as usize, args.num_heads as usize, codec.shape().head_dim];
        let k = Tensor::input("k", dtype, args.k, shape, [args.k_token_stride, args.k_head_stride])?;
        let v = Tensor::input("v", dtype, args.v, shape, [args.v_token_stride, args.v_head_stride])?;
        let page_bytes = codec.page_bytes();
        let pages = Pages::new(args.pages, [1, shape[1], page_bytes], [0, args.page_head_stride])?;
        disjoint(&[pages.region.extent()], &[k.extent(), v.extent()])?;
        // SAFETY: checked above; the header asks for memory that is there and left alone during the call.
        let (k, v, output) = unsafe { (k.shared(), v.shared(), pages.region.exclusive()) };

        // Into a place of our own first: head 3 may hold a NaN, and then the page of head 0 must not have changed.
        let mut sealed = vec![0; shape[1] * page_bytes];
        for (head, page) in sealed.chunks_exact_mut(page_bytes).enumerate() {
            codec.seal(
                args.layer as usize,
                args.first_head as usize + head,
                args.block_index as usize,
                k.head(0, head),
                v.head(0, head),
                page,
            )?;
        }
        for (head, page) in sealed.chunks_exact(page_bytes).enumerate() {
            output[head * pages.head_stride..][..page_bytes].copy_from_slice(page);
        }
        Ok(())
    })
}
