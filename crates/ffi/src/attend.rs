//! Attention of one step over pages, open blocks and the step's own tokens.

use std::ffi::c_void;

use ::kakeya_codec::step::{self, AttendArgs, AttendOptions};

use crate::checks::{Region, Sized32, arguments, arguments_named, disjoint, within};
use crate::codec::{borrow, check_heads, check_layer, kakeya_codec};
use crate::dtype::kakeya_dtype;
use crate::error::{Outcome, refuse};
use crate::panic::boundary;
use crate::status::kakeya_status::{self, *};
use crate::tensor::{OpenBlocks, OpenSlots, Pages, Tensor, table};

/// Flag of kakeya_attend_args: a query reads pages for every block before its own block, also for
/// blocks that were sealed in this step. Results then do not depend on how a prompt was cut into
/// steps, or on prefix hits. Without it, a step's own tokens are read raw.
pub const KAKEYA_ATTEND_SEALED_PREFILL: u32 = 1;

/// Arguments of kakeya_attend.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kakeya_attend_args {
    /// sizeof(kakeya_attend_args).
    pub struct_size: u32,
    /// Layer of the model.
    pub layer: u32,
    /// The first KV head of k, v, pages and open_blocks, counted in the whole model.
    pub first_head: u32,
    /// KV heads of k, v, pages and open_blocks.
    pub num_kv_heads: u32,
    /// Query heads of q, out and lse: as many for each KV head as the model has. Query head i reads
    /// KV head i / (num_q_heads / num_kv_heads).
    pub num_q_heads: u32,
    /// A kakeya_dtype: type of the elements of q, k, v, out and open_blocks.
    pub dtype: u32,
    /// Sequences of query_start, seq_lens and block_table.
    pub num_seqs: u32,
    /// Tokens of q, k, v, out and lse.
    pub num_tokens: u32,
    /// Blocks of pages and open_slot: block ids are 0..num_blocks-1.
    pub num_blocks: u32,
    /// Slots of open_blocks.
    pub num_open: u32,
    /// Block ids in a row of block_table.
    pub max_blocks_per_seq: u32,
    /// 0 or KAKEYA_ATTEND_SEALED_PREFILL.
    pub flags: u32,
    /// Factor on q.k, usually 1/sqrt(head_dim).
    pub scale: f32,
    /// Queries after RoPE, [num_tokens][num_q_heads][head_dim].
    pub q: *const c_void,
    /// K of the step's tokens after RoPE, [num_tokens][num_kv_heads][head_dim].
    pub k: *const c_void,
    /// V of the step's tokens, [num_tokens][num_kv_heads][head_dim].
    pub v: *const c_void,
    /// Elements from a token of q to the next.
    pub q_token_stride: i64,
    /// Elements from a head of q to the next.
    pub q_head_stride: i64,
    /// Elements from a token of k to the next.
    pub k_token_stride: i64,
    /// Elements from a head of k to the next.
    pub k_head_stride: i64,
    /// Elements from a token of v to the next.
    pub v_token_stride: i64,
    /// Elements from a head of v to the next.
    pub v_head_stride: i64,
    /// Output: attention, [num_tokens][num_q_heads][head_dim]. Rows of no sequence stay untouched.
    pub out: *mut c_void,
    /// Elements from a token of out to the next.
    pub out_token_stride: i64,
    /// Elements from a head of out to the next.
    pub out_head_stride: i64,
    /// [num_seqs + 1], ascending: sequence s has rows query_start[s] .. query_start[s+1]-1 of q, k,
    /// v and out. They are the last tokens of the sequence.
    pub query_start: *const i32,
    /// [num_seqs]: tokens of each sequence, those of this step included.
    pub seq_lens: *const i32,
    /// [num_seqs][max_blocks_per_seq]: block ids of each sequence; entries past its last block are
    /// not read.
    pub block_table: *const i32,
    /// Entries from a row of block_table to the next; at least max_blocks_per_seq.
    pub block_table_stride: i64,
    /// Pages, [num_blocks][num_kv_heads].
    pub pages: *const u8,
    /// Bytes from a block's pages to the next block's.
    pub page_block_stride: i64,
    /// Bytes from a head's page to the next head's of the same block.
    pub page_head_stride: i64,
    /// Open blocks, [num_open][2: K, V][num_kv_heads][128][head_dim], contiguous, in dtype. May be
    /// NULL if num_open is 0.
    pub open_blocks: *const c_void,
    /// [num_blocks]: the slot in open_blocks of each block, or -1. May be NULL if num_open is 0.
    pub open_slot: *const i32,
    /// Output: NULL, or [num_tokens][num_q_heads], contiguous: natural logarithm of the sum of
    /// exp(scale * q.k), for combining with attention over other tokens.
    pub lse: *mut f32,
}

// SAFETY: repr(C), struct_size first, integers, floats and raw pointers only.
unsafe impl Sized32 for kakeya_attend_args {
    const NAME: &'static str = "kakeya_attend_args";
}

/// What some models add to attention, for kakeya_attend_with and kakeya_cuda_attend_with.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kakeya_attend_options {
    /// sizeof(kakeya_attend_options).
    pub struct_size: u32,
    /// Scores s = scale * q.k become soft_cap * tanh(s / soft_cap); 0: they stay.
    pub soft_cap: f32,
    /// NULL, or [query heads of the call]: the score of a key without a value, for each query head. It
    /// takes part in the softmax and adds nothing to the output. Of kakeya_cuda_attend_with on the
    /// device.
    pub sinks: *const f32,
}

// SAFETY: repr(C), struct_size first, integers, floats and raw pointers only.
unsafe impl Sized32 for kakeya_attend_options {
    const NAME: &'static str = "kakeya_attend_options";
}

/// Refuses a soft cap that bends nothing.
pub(crate) fn check_soft_cap(soft_cap: f32) -> Outcome {
    if soft_cap >= 0.0 && soft_cap.is_finite() {
        return Ok(());
    }
    refuse!(KAKEYA_ERR_OUT_OF_RANGE, "soft_cap is {soft_cap}; valid: 0 (none) or a positive number")
}

/// Attention of a step's queries, after kakeya_write of the same step. Query token i of a sequence
/// sees every token up to itself:
///
///   history      the seq_len - query_len tokens before this step: full blocks from their pages,
///                the rest from the open block
///   this step    raw from k and v (see KAKEYA_ATTEND_SEALED_PREFILL for the other way)
///
/// What a sequence computes does not depend on what else is in the step. A sequence without query
/// tokens is skipped, whatever its seq_len and blocks are.
///
/// Errors: BAD_STRUCT_SIZE, BAD_DTYPE, OUT_OF_RANGE (layer, heads, flags, scale, query_start,
/// seq_lens, block_table, strides), NO_OPEN_SLOT, ALIASED, BAD_PAGE (also: a page of another
/// position), WRONG_VERSION (of a page).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_attend(
    codec: *const kakeya_codec,
    args: *const kakeya_attend_args,
) -> kakeya_status {
    boundary(|| {
        // SAFETY: what the header asks for.
        unsafe { attend(codec, args, None) }
    })
}

/// kakeya_attend with a soft cap of scores and attention sinks. lse then counts the sink.
///
/// Errors: as kakeya_attend, and OUT_OF_RANGE (soft_cap, sinks that are not finite).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_attend_with(
    codec: *const kakeya_codec,
    args: *const kakeya_attend_args,
    options: *const kakeya_attend_options,
) -> kakeya_status {
    boundary(|| {
        let options = arguments_named("options", options)?;
        // SAFETY: what the header asks for.
        unsafe { attend(codec, args, Some(options)) }
    })
}

/// Attention of both functions.
///
/// # Safety
/// `codec` is NULL or came from kakeya_codec_new and is not released during the call; the arrays of `args` and `options`
/// are there and nobody writes them.
unsafe fn attend(
    codec: *const kakeya_codec,
    args: *const kakeya_attend_args,
    options: Option<kakeya_attend_options>,
) -> Outcome {
    let args = arguments(args)?;
    // SAFETY: the header asks for a codec that is not released during the call.
    let codec = unsafe { borrow(codec) }?;
    check_layer(codec.shape(), args.layer)?;
    check_heads(codec.shape(), args.first_head, "num_kv_heads", args.num_kv_heads)?;
    let shape = codec.shape();
    let group = (shape.num_q_heads / shape.num_kv_heads) as u64;
    let q_heads = u64::from(args.num_kv_heads) * group;
    within("num_q_heads", args.num_q_heads.into(), q_heads, q_heads)?;
    let dtype = kakeya_dtype::from_number(args.dtype)?;
    if args.flags & !KAKEYA_ATTEND_SEALED_PREFILL != 0 {
        return refuse!(
            KAKEYA_ERR_OUT_OF_RANGE,
            "flags is {:#x}; valid: 0 or KAKEYA_ATTEND_SEALED_PREFILL (1)",
            args.flags
        );
    }
    if !args.scale.is_finite() {
        return refuse!(KAKEYA_ERR_OUT_OF_RANGE, "scale is {}; valid: a finite number", args.scale);
    }
    let soft_cap = options.map_or(0.0, |options| options.soft_cap);
    check_soft_cap(soft_cap)?;
    if args.num_seqs == 0 {
        return Ok(());
    }

    let (tokens, blocks, seqs) = (args.num_tokens as usize, args.num_blocks as usize, args.num_seqs as usize);
    let (q_heads, kv_heads) = (args.num_q_heads as usize, args.num_kv_heads as usize);
    let q_shape = [tokens, q_heads, shape.head_dim];
    let kv_shape = [tokens, kv_heads, shape.head_dim];
    let q = Tensor::input("q", dtype, args.q, q_shape, [args.q_token_stride, args.q_head_stride])?;
    let k = Tensor::input("k", dtype, args.k, kv_shape, [args.k_token_stride, args.k_head_stride])?;
    let v = Tensor::input("v", dtype, args.v, kv_shape, [args.v_token_stride, args.v_head_stride])?;
    let out = Tensor::output("out", dtype, args.out, q_shape, [args.out_token_stride, args.out_head_stride])?;
    let query_start = Region::new("query_start", args.query_start, seqs + 1)?;
    let seq_lens = Region::new("seq_lens", args.seq_lens, seqs)?;
    let columns = args.max_blocks_per_seq as usize;
    let (block_table, block_table_stride) = table(args.block_table, seqs, columns, args.block_table_stride)?;
    let pages = Pages::new(
        args.pages,
        [blocks, kv_heads, codec.page_bytes()],
        [args.page_block_stride, args.page_head_stride],
    )?;
    let open_blocks =
        OpenBlocks::new(codec.shape().head_dim, dtype, args.open_blocks, args.num_open, kv_heads)?;
    let open_slot = OpenSlots::new(args.open_slot, args.num_open, blocks)?;
    let lse_len = if args.lse.is_null() { 0 } else { tokens * q_heads };
    let lse = Region::new("lse", args.lse, lse_len)?;
    let sinks_ptr = options.map_or(std::ptr::null(), |options| options.sinks);
    let sinks_len = if sinks_ptr.is_null() { 0 } else { q_heads };
    let sinks = Region::new("sinks", sinks_ptr, sinks_len)?;
    disjoint(
        &[out.extent(), lse.extent()],
        &[
            q.extent(),
            k.extent(),
            v.extent(),
            query_start.extent(),
            seq_lens.extent(),
            block_table.extent(),
            pages.region.extent(),
            open_blocks.extent(),
            open_slot.extent(),
            sinks.extent(),
        ],
    )?;

    // SAFETY: checked above; the header asks for memory that is there and left alone during the call.
    let mut args = unsafe {
        AttendArgs {
            layer: args.layer as usize,
            first_head: args.first_head as usize,
            num_kv_heads: kv_heads,
            num_q_heads: q_heads,
            num_tokens: tokens,
            scale: args.scale,
            sealed_prefill: args.flags & KAKEYA_ATTEND_SEALED_PREFILL != 0,
            q: q.shared(),
            k: k.shared(),
            v: v.shared(),
            out: out.exclusive(),
            out_token_stride: out.token_stride,
            out_head_stride: out.head_stride,
            query_start: query_start.shared(),
            seq_lens: seq_lens.shared(),
            block_table: block_table.shared(),
            block_table_stride,
            max_blocks_per_seq: columns,
            pages: step::Pages {
                bytes: pages.region.shared(),
                num_blocks: blocks,
                block_stride: pages.block_stride,
                head_stride: pages.head_stride,
            },
            open_blocks: open_blocks.shared(),
            num_open: args.num_open as usize,
            open_slot: &open_slot.shared(),
            lse: (lse_len > 0).then(|| lse.exclusive()),
            options: AttendOptions { soft_cap, sinks: (sinks_len > 0).then(|| sinks.shared()) },
        }
    };
    // Also checks what the arrays hold: rows, lengths, block ids, open slots, page headers.
    Ok(step::attend(codec, &mut args)?)
}
