//! Seal-and-write: the tokens of one step go to their open blocks, and blocks that fill up are sealed.

use std::ffi::c_void;

use ::kakeya_codec::step::{self, WriteArgs};

use crate::checks::{Region, Sized32, arguments, disjoint};
use crate::codec::{borrow, check_heads, check_layer, kakeya_codec};
use crate::dtype::kakeya_dtype;
use crate::panic::boundary;
use crate::status::kakeya_status;
use crate::tensor::{OpenBlocks, OpenSlots, Pages, Tensor};

/// Arguments of kakeya_write.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kakeya_write_args {
    /// sizeof(kakeya_write_args).
    pub struct_size: u32,
    /// Layer of the model.
    pub layer: u32,
    /// The first KV head of k, v, pages and open_blocks, counted in the whole model.
    pub first_head: u32,
    /// KV heads of k, v, pages and open_blocks.
    pub num_heads: u32,
    /// A kakeya_dtype: type of the elements of k, v and open_blocks.
    pub dtype: u32,
    /// Tokens of k, v, slot_mapping and positions. 0 is fine: nothing happens.
    pub num_tokens: u32,
    /// Blocks of pages and open_slot: block ids are 0..num_blocks-1.
    pub num_blocks: u32,
    /// Slots of open_blocks.
    pub num_open: u32,
    /// K after RoPE, [num_tokens][num_heads][head_dim].
    pub k: *const c_void,
    /// V, [num_tokens][num_heads][head_dim].
    pub v: *const c_void,
    /// Elements from a token of k to the next.
    pub k_token_stride: i64,
    /// Elements from a head of k to the next.
    pub k_head_stride: i64,
    /// Elements from a token of v to the next.
    pub v_token_stride: i64,
    /// Elements from a head of v to the next.
    pub v_head_stride: i64,
    /// [num_tokens]: block_id * 128 + offset of each token, or -1 for padding, which is ignored.
    pub slot_mapping: *const i64,
    /// [num_tokens]: position of each token in its sequence; position % 128 equals slot % 128.
    pub positions: *const i32,
    /// Output: pages, [num_blocks][num_heads].
    pub pages: *mut u8,
    /// Bytes from a block's pages to the next block's.
    pub page_block_stride: i64,
    /// Bytes from a head's page to the next head's of the same block.
    pub page_head_stride: i64,
    /// Output: open blocks, [num_open][2: K, V][num_heads][128][head_dim], contiguous, in dtype.
    /// May be NULL if num_open is 0.
    pub open_blocks: *mut c_void,
    /// [num_blocks]: the slot in open_blocks of each block, or -1. May be NULL if num_open is 0.
    pub open_slot: *const i32,
}

// SAFETY: repr(C), struct_size first, integers and raw pointers only.
unsafe impl Sized32 for kakeya_write_args {
    const NAME: &'static str = "kakeya_write_args";
}

/// Stores the K and V of a step. Every token goes to the open block of its block; a block whose
/// last token (offset 127) is written is sealed into its pages. A token that is written again
/// replaces the earlier one, and a block whose last token is written again is sealed again.
///
/// A block needs a slot in open_blocks (open_slot[block_id] >= 0, one block a slot) unless this
/// call holds all of it: its 128 tokens in ascending order, one after the other. The slot is free
/// for another block once its block is sealed, kakeya_attend of that step is done, and none of its
/// tokens will be written again.
///
/// Errors: BAD_STRUCT_SIZE, BAD_DTYPE, OUT_OF_RANGE (layer, heads, slots, slots named twice,
/// positions, strides), NO_OPEN_SLOT, ALIASED, NON_FINITE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_write(
    codec: *const kakeya_codec,
    args: *const kakeya_write_args,
) -> kakeya_status {
    boundary(|| {
        let args = arguments(args)?;
        // SAFETY: the header asks for a codec that is not released during the call.
        let codec = unsafe { borrow(codec) }?;
        check_layer(codec.shape(), args.layer)?;
        check_heads(codec.shape(), args.first_head, "num_heads", args.num_heads)?;
        let dtype = kakeya_dtype::from_number(args.dtype)?;

        let (tokens, heads, blocks) =
            (args.num_tokens as usize, args.num_heads as usize, args.num_blocks as usize);
        let shape = [tokens, heads, codec.shape().head_dim];
        let k = Tensor::input("k", dtype, args.k, shape, [args.k_token_stride, args.k_head_stride])?;
        let v = Tensor::input("v", dtype, args.v, shape, [args.v_token_stride, args.v_head_stride])?;
        let slot_mapping = Region::new("slot_mapping", args.slot_mapping, tokens)?;
        let positions = Region::new("positions", args.positions, tokens)?;
        let pages = Pages::new(
            args.pages,
            [blocks, heads, codec.page_bytes()],
            [args.page_block_stride, args.page_head_stride],
        )?;
        let open_blocks =
            OpenBlocks::new(codec.shape().head_dim, dtype, args.open_blocks, args.num_open, heads)?;
        let open_slot = OpenSlots::new(args.open_slot, args.num_open, blocks)?;
        disjoint(
            &[pages.region.extent(), open_blocks.extent()],
            &[k.extent(), v.extent(), slot_mapping.extent(), positions.extent(), open_slot.extent()],
        )?;

        // SAFETY: checked above; the header asks for memory that is there and left alone during the call.
        let mut args = unsafe {
            WriteArgs {
                layer: args.layer as usize,
                first_head: args.first_head as usize,
                num_heads: heads,
                num_tokens: tokens,
                k: k.shared(),
                v: v.shared(),
                slot_mapping: slot_mapping.shared(),
                positions: positions.shared(),
                pages: pages.region.exclusive(),
                num_blocks: blocks,
                page_block_stride: pages.block_stride,
                page_head_stride: pages.head_stride,
                open_blocks: open_blocks.exclusive(),
                num_open: args.num_open as usize,
                open_slot: &open_slot.shared(),
            }
        };
        // Also checks what the arrays hold: slots, positions, open slots.
        Ok(step::write(codec, &mut args)?)
    })
}
