//! A step on a CUDA device: the same pages and open blocks, in the device's memory, by kernels on a stream.

use std::ffi::{CStr, c_char, c_void};
use std::mem::size_of;

use ::kakeya_codec::ModelShape;

use crate::attend::kakeya_attend_options;
use crate::checks::{Sized32, arguments_named, pointer, struct_size, within};
use crate::codec::{borrow, kakeya_codec};
use crate::driver::{self, Device};
use crate::kernels::{Kernels, Limits};
use crate::launch::{handle, launch};
use crate::panic::{boundary, release, text_or_empty};
use crate::status::kakeya_status;

/// A codec made ready for one CUDA device: kernels loaded, static tables in the device's memory. It
/// does not need its codec any more.
///
/// Threads: as a codec's. Immutable once made; any number of threads may launch with it at once, each on
/// a stream of its own or in turn on one. Launches that may run at the same time need a plan, a
/// workspace and counters each.
pub struct kakeya_cuda {
    pub(crate) device: Device,
    pub(crate) kernels: Kernels,
    pub(crate) limits: Limits,
    pub(crate) tables: u64,
    pub(crate) shape: ModelShape,
    pub(crate) page_bytes: usize,
}

/// What steps on the device hold at most; sizes of buffers follow from it (kakeya_cuda_sizes).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kakeya_cuda_limits {
    /// sizeof(kakeya_cuda_limits).
    pub struct_size: u32,
    /// Ordinal of the device, as CUDA counts the visible ones.
    pub device: i32,
    /// Sequences of a step.
    pub max_seqs: u32,
    /// Tokens of a step.
    pub max_tokens: u32,
    /// Tokens of a sequence in a step up to which kakeya_cuda_attend serves it: 1..8. Longer ones are prefill.
    pub max_query: u32,
    /// KV heads of this rank.
    pub num_kv_heads: u32,
    /// 1: what kakeya_cuda_attend computes for a token depends on no other sequence of the step and not on
    /// how many tokens of its own sequence it comes with, bit for bit. No sequence is divided then, so
    /// few long ones are slow. 0 otherwise.
    pub batch_invariant: u32,
}

// SAFETY: repr(C), struct_size first, integers only.
unsafe impl Sized32 for kakeya_cuda_limits {
    const NAME: &'static str = "kakeya_cuda_limits";
}

/// Buffers in the device's memory that the caller allocates once.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kakeya_cuda_buffers {
    /// sizeof(kakeya_cuda_buffers), set by the caller.
    pub struct_size: u32,
    /// Thread blocks of an attention launch: as many as run at once.
    pub attend_blocks: u32,
    /// int32 of a plan.
    pub plan_len: u64,
    /// float32 of attention's workspace. Launches on one stream may share it.
    pub workspace_len: u64,
    /// int32 of attention's counters: zero before the first launch, and zero again after each.
    pub counters_len: u64,
}

// SAFETY: repr(C), struct_size first, integers only.
unsafe impl Sized32 for kakeya_cuda_buffers {
    const NAME: &'static str = "kakeya_cuda_buffers";
}

/// Arguments of kakeya_cuda_plan. Pointers but `stream` are to the device's memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kakeya_cuda_plan_args {
    /// sizeof(kakeya_cuda_plan_args).
    pub struct_size: u32,
    /// Sequences of query_start, seq_lens and block_table, padding included; up to max_seqs.
    pub num_seqs: u32,
    /// Block ids in a row of block_table.
    pub max_blocks_per_seq: u32,
    /// Blocks of open_slot: block ids are 0..num_blocks-1.
    pub num_blocks: u32,
    /// [num_seqs + 1], ascending: rows of each sequence. A sequence without rows is padding.
    pub query_start: *const i32,
    /// [num_seqs]: tokens of each sequence, those of this step included.
    pub seq_lens: *const i32,
    /// [num_seqs][max_blocks_per_seq]: block ids of each sequence.
    pub block_table: *const i32,
    /// Entries from a row of block_table to the next.
    pub block_table_stride: i64,
    /// [num_blocks]: the slot in open_blocks of each block, or -1.
    pub open_slot: *const i32,
    /// Output: [plan_len].
    pub plan: *mut i32,
    /// A CUstream (cudaStream_t) of the device's primary context.
    pub stream: *mut c_void,
}

// SAFETY: repr(C), struct_size first, integers and raw pointers only.
unsafe impl Sized32 for kakeya_cuda_plan_args {
    const NAME: &'static str = "kakeya_cuda_plan_args";
}

/// Arguments of kakeya_cuda_append and kakeya_cuda_seal. Pointers but `stream` are to the device's
/// memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kakeya_cuda_write_args {
    /// sizeof(kakeya_cuda_write_args).
    pub struct_size: u32,
    /// Layer of the model.
    pub layer: u32,
    /// The first KV head of k, v, pages and open_blocks, counted in the whole model.
    pub first_head: u32,
    /// KAKEYA_DTYPE_BF16 or KAKEYA_DTYPE_F16: type of the elements of k, v and open_blocks.
    pub dtype: u32,
    /// Tokens of k, v and slot_mapping, padding included; up to max_tokens.
    pub num_tokens: u32,
    /// Sequences of the plan.
    pub num_seqs: u32,
    /// Blocks of pages and open_slot.
    pub num_blocks: u32,
    /// Slots of open_blocks.
    pub num_open: u32,
    /// K after RoPE, [num_tokens][num_kv_heads][head_dim]. 16-byte aligned, as its strides.
    pub k: *const c_void,
    /// V, likewise.
    pub v: *const c_void,
    /// Elements from a token of k to the next.
    pub k_token_stride: i64,
    /// Elements from a head of k to the next.
    pub k_head_stride: i64,
    /// Elements from a token of v to the next.
    pub v_token_stride: i64,
    /// Elements from a head of v to the next.
    pub v_head_stride: i64,
    /// [num_tokens]: block_id * 128 + offset of each token, or -1 for padding.
    pub slot_mapping: *const i64,
    /// [num_blocks]: the slot in open_blocks of each block, or -1.
    pub open_slot: *const i32,
    /// Output of append: open blocks, [num_open][2: K, V][num_kv_heads][128][head_dim], contiguous.
    pub open_blocks: *mut c_void,
    /// The plan of this step.
    pub plan: *const i32,
    /// Output of seal: pages, [num_blocks][num_kv_heads]. 16-byte aligned, as its strides.
    pub pages: *mut u8,
    /// Bytes from a block's pages to the next block's.
    pub page_block_stride: i64,
    /// Bytes from a head's page to the next head's of the same block.
    pub page_head_stride: i64,
    /// Output of seal: one uint32 that takes bits where a page could not be written: 1 a value is not
    /// finite or above 2^24, 2 a block that began before this step has no slot.
    pub status: *mut u32,
    /// A CUstream of the device's primary context.
    pub stream: *mut c_void,
}

// SAFETY: repr(C), struct_size first, integers and raw pointers only.
unsafe impl Sized32 for kakeya_cuda_write_args {
    const NAME: &'static str = "kakeya_cuda_write_args";
}

/// Arguments of kakeya_cuda_attend. Pointers but `stream` are to the device's memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kakeya_cuda_attend_args {
    /// sizeof(kakeya_cuda_attend_args).
    pub struct_size: u32,
    /// Layer of the model.
    pub layer: u32,
    /// The first KV head of pages and open_blocks, counted in the whole model.
    pub first_head: u32,
    /// KAKEYA_DTYPE_BF16 or KAKEYA_DTYPE_F16: type of the elements of q, out and open_blocks.
    pub dtype: u32,
    /// Sequences of the plan.
    pub num_seqs: u32,
    /// Tokens of q and out, padding included.
    pub num_tokens: u32,
    /// Blocks of pages and open_slot.
    pub num_blocks: u32,
    /// Slots of open_blocks.
    pub num_open: u32,
    /// Block ids in a row of block_table.
    pub max_blocks_per_seq: u32,
    /// Factor on q.k, usually 1/sqrt(head_dim).
    pub scale: f32,
    /// Queries after RoPE, [num_tokens][query heads][head_dim]. 16-byte aligned, as its strides.
    pub q: *const c_void,
    /// Elements from a token of q to the next.
    pub q_token_stride: i64,
    /// Elements from a head of q to the next.
    pub q_head_stride: i64,
    /// Output: attention, likewise. Rows of padding and of sequences with more than max_query tokens
    /// stay untouched.
    pub out: *mut c_void,
    /// Elements from a token of out to the next.
    pub out_token_stride: i64,
    /// Elements from a head of out to the next.
    pub out_head_stride: i64,
    /// As kakeya_cuda_plan took it.
    pub query_start: *const i32,
    /// As kakeya_cuda_plan took it.
    pub seq_lens: *const i32,
    /// As kakeya_cuda_plan took it.
    pub block_table: *const i32,
    /// Entries from a row of block_table to the next.
    pub block_table_stride: i64,
    /// Pages, [num_blocks][num_kv_heads]. 16-byte aligned, as its strides.
    pub pages: *const u8,
    /// Bytes from a block's pages to the next block's.
    pub page_block_stride: i64,
    /// Bytes from a head's page to the next head's of the same block.
    pub page_head_stride: i64,
    /// Open blocks, [num_open][2: K, V][num_kv_heads][128][head_dim], contiguous.
    pub open_blocks: *const c_void,
    /// [num_blocks]: the slot in open_blocks of each block, or -1.
    pub open_slot: *const i32,
    /// The plan of this step.
    pub plan: *const i32,
    /// [workspace_len], not read before it is written.
    pub workspace: *mut f32,
    /// [counters_len].
    pub counters: *mut i32,
    /// A CUstream of the device's primary context.
    pub stream: *mut c_void,
}

// SAFETY: repr(C), struct_size first, integers, floats and raw pointers only.
unsafe impl Sized32 for kakeya_cuda_attend_args {
    const NAME: &'static str = "kakeya_cuda_attend_args";
}

/// Arguments of kakeya_cuda_open. Pointers but `stream` are to the device's memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kakeya_cuda_open_args {
    /// sizeof(kakeya_cuda_open_args).
    pub struct_size: u32,
    /// Layer of the model.
    pub layer: u32,
    /// The first KV head of pages, counted in the whole model.
    pub first_head: u32,
    /// KAKEYA_DTYPE_BF16 or KAKEYA_DTYPE_F16: type of the elements of k and v.
    pub dtype: u32,
    /// Blocks to open.
    pub count: u32,
    /// Blocks of pages.
    pub num_blocks: u32,
    /// [count]: ids of the blocks. Block i fills rows 128 i .. 128 i + 127 of k and v.
    pub blocks: *const i32,
    /// Pages, [num_blocks][num_kv_heads]. 16-byte aligned, as its strides.
    pub pages: *const u8,
    /// Bytes from a block's pages to the next block's.
    pub page_block_stride: i64,
    /// Bytes from a head's page to the next head's of the same block.
    pub page_head_stride: i64,
    /// Output: K after RoPE, [128 count][num_kv_heads][head_dim]. 16-byte aligned, as its strides.
    pub k: *mut c_void,
    /// Output: V, likewise.
    pub v: *mut c_void,
    /// Elements from a token of k to the next.
    pub k_token_stride: i64,
    /// Elements from a head of k to the next.
    pub k_head_stride: i64,
    /// Elements from a token of v to the next.
    pub v_token_stride: i64,
    /// Elements from a head of v to the next.
    pub v_head_stride: i64,
    /// A CUstream of the device's primary context.
    pub stream: *mut c_void,
}

// SAFETY: repr(C), struct_size first, integers and raw pointers only.
unsafe impl Sized32 for kakeya_cuda_open_args {
    const NAME: &'static str = "kakeya_cuda_open_args";
}

/// What the kernels in this library were compiled for, such as "sm_80 sm_90 compute_80": machine code
/// for those GPUs, and code that the driver compiles for newer ones. "" without kernels: then
/// kakeya_cuda_new returns NO_KERNELS. Static text.
#[unsafe(no_mangle)]
pub extern "C" fn kakeya_cuda_archs() -> *const c_char {
    text_or_empty(|| {
        const LEN: usize = driver::ARCHS.len() + 1;
        const BYTES: [u8; LEN] = {
            let mut bytes = [0; LEN];
            let mut i = 0;
            while i + 1 < LEN {
                bytes[i] = driver::ARCHS.as_bytes()[i];
                i += 1;
            }
            bytes
        };
        static TEXT: [u8; LEN] = BYTES;
        match CStr::from_bytes_with_nul(&TEXT) {
            Ok(text) => text.as_ptr(),
            Err(_) => c"".as_ptr(),
        }
    })
}

/// Makes a codec ready for a device: loads the kernels and copies the static tables there. The one
/// function here that allocates (a few MiB of the device's memory) and waits; give the result to
/// kakeya_cuda_free. The codec may be released before.
///
/// Errors: BAD_STRUCT_SIZE, OUT_OF_RANGE (limits), NO_KERNELS, NO_CUDA, WRONG_DEVICE (there is none of
/// this number), CUDA, UNSUPPORTED (head_dim; too little shared memory).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_cuda_new(
    codec: *const kakeya_codec,
    limits: *const kakeya_cuda_limits,
    out: *mut *mut kakeya_cuda,
) -> kakeya_status {
    boundary(|| {
        pointer("out", out)?;
        let asked = arguments_named("limits", limits)?;
        // SAFETY: the header asks for a codec that is not released during the call.
        let codec = unsafe { borrow(codec) }?;
        // Offsets inside the kernels' buffers are int32.
        within("max_seqs", asked.max_seqs.into(), 1, 1 << 16)?;
        within("max_tokens", asked.max_tokens.into(), asked.max_seqs.into(), 1 << 24)?;
        within("max_query", asked.max_query.into(), 1, 8)?;
        within("num_kv_heads", asked.num_kv_heads.into(), 1, codec.shape().num_kv_heads as u64)?;
        within("batch_invariant", asked.batch_invariant.into(), 0, 1)?;
        let limits = Limits {
            max_seqs: asked.max_seqs,
            max_tokens: asked.max_tokens,
            max_query: asked.max_query,
            num_kv_heads: asked.num_kv_heads,
            batch_invariant: asked.batch_invariant == 1,
        };
        let mut device = Device::new(asked.device)?;
        let kernels = Kernels::new(&device, codec, &limits)?;
        let tables = device.upload(&::kakeya_codec::device::tables(codec))?;
        let made = kakeya_cuda {
            device,
            kernels,
            limits,
            tables,
            shape: codec.shape().clone(),
            page_bytes: codec.page_bytes(),
        };
        // SAFETY: not NULL, aligned, and the caller's to write.
        unsafe { out.write(Box::into_raw(Box::new(made))) };
        Ok(())
    })
}

/// Releases a device's codec. NULL is fine. It waits for kernels that run; no other call may use it
/// during this one or after it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_cuda_free(cuda: *mut kakeya_cuda) {
    release(|| {
        if !cuda.is_null() && cuda.is_aligned() {
            // SAFETY: the header asks for a value of kakeya_cuda_new that has not been released; it came out of
            // Box::into_raw there.
            drop(unsafe { Box::from_raw(cuda) });
        }
        Ok(())
    })
}

/// Sizes of the buffers that the other functions take. The caller sets out->struct_size first.
///
/// Errors: BAD_STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_cuda_sizes(
    cuda: *const kakeya_cuda,
    out: *mut kakeya_cuda_buffers,
) -> kakeya_status {
    boundary(|| {
        struct_size("out", out)?;
        // SAFETY: the header asks for a value that is not released during the call.
        let cuda = unsafe { handle(cuda) }?;
        let attend = &cuda.kernels.attend;
        let filled = kakeya_cuda_buffers {
            struct_size: size_of::<kakeya_cuda_buffers>() as u32,
            attend_blocks: attend.plain.grid[0] * attend.plain.grid[1],
            plan_len: cuda.limits.plan_len(),
            workspace_len: attend.workspace_len(&cuda.limits, cuda.shape.head_dim),
            counters_len: attend.counters_len(&cuda.limits),
        };
        // SAFETY: not NULL, aligned, of this size (struct_size), and the caller's to write.
        unsafe { out.write(filled) };
        Ok(())
    })
}

/// Writes the plan of a step: which blocks it fills, and how attention is divided. Once a step, before
/// the other functions; the plan serves all layers. Launches on `stream` and returns at once, as all
/// below: nothing is allocated or waited for, so the launch may be captured in a CUDA graph.
///
/// What arrays in the device's memory hold is not checked: block ids, slots and lengths must be what
/// the comments say. That they begin in memory of the device is (WRONG_DEVICE), here and below.
///
/// Errors: BAD_STRUCT_SIZE, OUT_OF_RANGE (num_seqs, strides), ALIASED, WRONG_DEVICE, CUDA.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_cuda_plan(
    cuda: *const kakeya_cuda,
    args: *const kakeya_cuda_plan_args,
) -> kakeya_status {
    // SAFETY: the header asks of the caller what `launch` asks.
    unsafe { launch(cuda, args, kakeya_cuda::plan) }
}

/// Copies the K and V of a step into open blocks: every token whose block has a slot.
///
/// Errors: BAD_STRUCT_SIZE, BAD_DTYPE, OUT_OF_RANGE (layer, heads, counts, strides), ALIASED,
/// WRONG_DEVICE, CUDA.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_cuda_append(
    cuda: *const kakeya_cuda,
    args: *const kakeya_cuda_write_args,
) -> kakeya_status {
    // SAFETY: the header asks of the caller what `launch` asks.
    unsafe { launch(cuda, args, kakeya_cuda::append) }
}

/// Seals the blocks that the step fills, after kakeya_cuda_append of the same step and layer: from k
/// and v where the step holds all of a block, else from its open block.
///
/// Errors: as kakeya_cuda_append.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_cuda_seal(
    cuda: *const kakeya_cuda,
    args: *const kakeya_cuda_write_args,
) -> kakeya_status {
    // SAFETY: the header asks of the caller what `launch` asks.
    unsafe { launch(cuda, args, kakeya_cuda::seal) }
}

/// Attention of the sequences with up to max_query tokens in this step, after kakeya_cuda_seal. A query
/// token sees every token of its sequence up to itself: blocks before its own from their pages, also
/// those that this step filled, its own block raw.
///
/// Errors: BAD_STRUCT_SIZE, BAD_DTYPE, OUT_OF_RANGE (layer, heads, counts, scale, strides), ALIASED,
/// WRONG_DEVICE, CUDA.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_cuda_attend(
    cuda: *const kakeya_cuda,
    args: *const kakeya_cuda_attend_args,
) -> kakeya_status {
    // SAFETY: the header asks of the caller what `launch` asks.
    unsafe { launch(cuda, args, |cuda, args| cuda.attend(args, None)) }
}

/// kakeya_cuda_attend with a soft cap of scores and attention sinks.
///
/// Errors: as kakeya_cuda_attend, and OUT_OF_RANGE (soft_cap), UNSUPPORTED (a soft cap on a GPU with too
/// little shared memory for it). Sinks are not looked at: one that is not finite makes its head's output
/// so.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_cuda_attend_with(
    cuda: *const kakeya_cuda,
    args: *const kakeya_cuda_attend_args,
    options: *const kakeya_attend_options,
) -> kakeya_status {
    // SAFETY: the header asks of the caller what `launch` asks.
    unsafe { launch(cuda, args, |cuda, args| cuda.attend(args, Some(arguments_named("options", options)?))) }
}

/// Whether kakeya_cuda_attend_with would take these options in any step: to be asked before the first one.
///
/// Errors: NULL_POINTER, BAD_STRUCT_SIZE, and OUT_OF_RANGE and UNSUPPORTED as kakeya_cuda_attend_with.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_cuda_require_options(
    cuda: *const kakeya_cuda,
    options: *const kakeya_attend_options,
) -> kakeya_status {
    boundary(|| {
        let options = arguments_named("options", options)?;
        // SAFETY: the header asks for a handle that is not released during the call.
        let cuda = unsafe { handle(cuda) }?;
        cuda.attention_for(options.soft_cap).map(|_| ())
    })
}

/// Opens pages into dense rows, for prefill that continues a sequence, and for debugging.
///
/// Errors: BAD_STRUCT_SIZE, BAD_DTYPE, OUT_OF_RANGE (layer, heads, count, strides), ALIASED,
/// WRONG_DEVICE, CUDA.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_cuda_open(
    cuda: *const kakeya_cuda,
    args: *const kakeya_cuda_open_args,
) -> kakeya_status {
    // SAFETY: the header asks of the caller what `launch` asks.
    unsafe { launch(cuda, args, kakeya_cuda::open) }
}
