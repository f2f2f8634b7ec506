//! A step on a CUDA device: the same pages and open blocks, in the device's memory, by kernels on a stream.

use std::ffi::{CStr, c_char, c_void};
use std::mem::size_of;
use std::ptr::from_mut;

use ::kakeya_codec::ModelShape;

use crate::checks::{Region, Sized32, arguments, arguments_named, disjoint, pointer, struct_size, within};
use crate::codec::{borrow, check_heads, check_layer, kakeya_codec};
use crate::driver::{self, Device};
use crate::dtype::kakeya_dtype;
use crate::error::{Outcome, refuse};
use crate::kernels::{AppendParams, AttendParams, Kernels, Limits, OpenParams, PlanParams, SealParams};
use crate::panic::boundary;
use crate::status::kakeya_status::{self, *};
use crate::tensor::{OpenBlocks, OpenSlots, Pages, Tensor, table};
use crate::version::KAKEYA_BLOCK_TOKENS;

/// A codec made ready for one CUDA device: kernels loaded, static tables in the device's memory.
/// Immutable: any number of threads may use it at once. It does not need its codec any more.
pub struct kakeya_cuda {
    device: Device,
    kernels: Kernels,
    limits: Limits,
    tables: u64,
    shape: ModelShape,
    page_bytes: usize,
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
}

/// Makes a codec ready for a device: loads the kernels and copies the static tables there. The one
/// function here that allocates (a few MiB of the device's memory) and waits; give the result to
/// kakeya_cuda_free. The codec may be released before.
///
/// Errors: BAD_STRUCT_SIZE, OUT_OF_RANGE (limits), NO_KERNELS, NO_CUDA, CUDA, UNSUPPORTED (head_dim;
/// too little shared memory).
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
        let limits = Limits {
            max_seqs: asked.max_seqs,
            max_tokens: asked.max_tokens,
            max_query: asked.max_query,
            num_kv_heads: asked.num_kv_heads,
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
    if cuda.is_null() || !cuda.is_aligned() {
        return;
    }
    // No status to return: a panic is kept as this thread's last error and goes no further.
    let _ = boundary(|| {
        // SAFETY: the header asks for a value of kakeya_cuda_new that has not been released; it came out of
        // Box::into_raw there.
        drop(unsafe { Box::from_raw(cuda) });
        Ok(())
    });
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
            attend_blocks: attend.grid[0] * attend.grid[1],
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
/// the comments say.
///
/// Errors: BAD_STRUCT_SIZE, OUT_OF_RANGE (num_seqs, strides), ALIASED, CUDA.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_cuda_plan(
    cuda: *const kakeya_cuda,
    args: *const kakeya_cuda_plan_args,
) -> kakeya_status {
    boundary(|| {
        let args = arguments(args)?;
        // SAFETY: the header asks for a value that is not released during the call.
        let cuda = unsafe { handle(cuda) }?;
        let limits = &cuda.limits;
        within("num_seqs", args.num_seqs.into(), 0, limits.max_seqs.into())?;
        let inputs = Sequences::new(
            args.num_seqs,
            args.query_start,
            args.seq_lens,
            args.block_table,
            [args.max_blocks_per_seq as i64, args.block_table_stride],
        )?;
        let open_slot = Region::new("open_slot", args.open_slot, args.num_blocks as usize)?;
        let plan = Region::new("plan", args.plan, limits.plan_len() as usize)?;
        disjoint(&[plan.extent()], &[&inputs.extents()[..], &[open_slot.extent()]].concat())?;
        let mut params = PlanParams {
            query_start: args.query_start,
            seq_lens: args.seq_lens,
            block_table: args.block_table,
            open_slot: args.open_slot,
            block_table_stride: args.block_table_stride,
            plan: args.plan,
            num_seqs: args.num_seqs as i32,
            max_seqs: limits.max_seqs as i32,
            max_tasks: limits.max_tasks() as i32,
            max_query: limits.max_query as i32,
        };
        // SAFETY: the kernel takes this one struct; the header asks for memory that is there until it has run.
        unsafe {
            cuda.device.launch(
                &cuda.kernels.plan,
                [1, 1, 1],
                args.stream,
                &mut [from_mut(&mut params).cast()],
            )
        }
    })
}

/// Copies the K and V of a step into open blocks: every token whose block has a slot.
///
/// Errors: BAD_STRUCT_SIZE, BAD_DTYPE, OUT_OF_RANGE (layer, heads, counts, strides), ALIASED, CUDA.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_cuda_append(
    cuda: *const kakeya_cuda,
    args: *const kakeya_cuda_write_args,
) -> kakeya_status {
    boundary(|| {
        let args = arguments(args)?;
        // SAFETY: the header asks for a value that is not released during the call.
        let cuda = unsafe { handle(cuda) }?;
        let element = cuda.check_write(&args)?;
        let heads = cuda.limits.num_kv_heads;
        let mut params = AppendParams {
            k: args.k,
            v: args.v,
            k_token_stride: args.k_token_stride,
            k_head_stride: args.k_head_stride,
            v_token_stride: args.v_token_stride,
            v_head_stride: args.v_head_stride,
            slot_mapping: args.slot_mapping,
            open_slot: args.open_slot,
            open_blocks: args.open_blocks,
            num_tokens: args.num_tokens as i32,
            num_kv_heads: heads as i32,
            head_dim: cuda.shape.head_dim as i32,
            reserved: 0,
        };
        let grid = cuda.kernels.append_grid(args.num_tokens, heads, cuda.shape.head_dim);
        // SAFETY: as in kakeya_cuda_plan.
        unsafe {
            cuda.device.launch(
                &cuda.kernels.append[element],
                grid,
                args.stream,
                &mut [from_mut(&mut params).cast()],
            )
        }
    })
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
    boundary(|| {
        let args = arguments(args)?;
        // SAFETY: the header asks for a value that is not released during the call.
        let cuda = unsafe { handle(cuda) }?;
        let element = cuda.check_write(&args)?;
        let heads = cuda.limits.num_kv_heads;
        let mut params = SealParams {
            tables: cuda.tables,
            k: args.k,
            v: args.v,
            k_token_stride: args.k_token_stride,
            k_head_stride: args.k_head_stride,
            v_token_stride: args.v_token_stride,
            v_head_stride: args.v_head_stride,
            open_blocks: args.open_blocks,
            plan: args.plan,
            pages: args.pages,
            page_block_stride: args.page_block_stride,
            page_head_stride: args.page_head_stride,
            status: args.status,
            layer: args.layer as i32,
            first_head: args.first_head as i32,
            num_kv_heads: heads as i32,
            element: element as i32,
        };
        let grid = cuda.kernels.seal_grid(args.num_seqs, args.num_tokens, heads);
        // SAFETY: as in kakeya_cuda_plan.
        unsafe {
            cuda.device.launch(
                &cuda.kernels.seal[element],
                grid,
                args.stream,
                &mut [from_mut(&mut params).cast()],
            )
        }
    })
}

/// Attention of the sequences with up to max_query tokens in this step, after kakeya_cuda_append. A
/// query token sees every token of its sequence up to itself; blocks that this step filled are read
/// raw.
///
/// Errors: BAD_STRUCT_SIZE, BAD_DTYPE, OUT_OF_RANGE (layer, heads, counts, scale, strides), ALIASED,
/// CUDA.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_cuda_attend(
    cuda: *const kakeya_cuda,
    args: *const kakeya_cuda_attend_args,
) -> kakeya_status {
    boundary(|| {
        let args = arguments(args)?;
        // SAFETY: the header asks for a value that is not released during the call.
        let cuda = unsafe { handle(cuda) }?;
        let (limits, attend) = (&cuda.limits, &cuda.kernels.attend);
        let (dtype, element) = cuda.check_common(args.layer, args.first_head, args.dtype)?;
        within("num_seqs", args.num_seqs.into(), 0, limits.max_seqs.into())?;
        within("num_tokens", args.num_tokens.into(), 0, limits.max_tokens.into())?;
        if !args.scale.is_finite() {
            return refuse!(KAKEYA_ERR_OUT_OF_RANGE, "scale is {}; valid: a finite number", args.scale);
        }
        let group = cuda.shape.num_q_heads / cuda.shape.num_kv_heads;
        let shape = [args.num_tokens as usize, limits.num_kv_heads as usize * group, cuda.shape.head_dim];
        let q = Tensor::input("q", dtype, args.q, shape, [args.q_token_stride, args.q_head_stride])?;
        let out =
            Tensor::output("out", dtype, args.out, shape, [args.out_token_stride, args.out_head_stride])?;
        aligned("q", args.q, &[args.q_token_stride * 2, args.q_head_stride * 2])?;
        aligned("out", args.out, &[args.out_token_stride * 2, args.out_head_stride * 2])?;
        let sequences = Sequences::new(
            args.num_seqs,
            args.query_start,
            args.seq_lens,
            args.block_table,
            [args.max_blocks_per_seq as i64, args.block_table_stride],
        )?;
        let pages =
            cuda.pages(args.pages, args.num_blocks, [args.page_block_stride, args.page_head_stride])?;
        let open_blocks = cuda.open_blocks(dtype, args.open_blocks, args.num_open)?;
        let open_slot = OpenSlots::new(args.open_slot, args.num_open, args.num_blocks as usize)?;
        let plan = Region::new("plan", args.plan, limits.plan_len() as usize)?;
        let workspace = Region::new(
            "workspace",
            args.workspace,
            attend.workspace_len(limits, cuda.shape.head_dim) as usize,
        )?;
        let counters = Region::new("counters", args.counters, attend.counters_len(limits) as usize)?;
        disjoint(
            &[out.extent(), workspace.extent(), counters.extent()],
            &[
                &sequences.extents()[..],
                &[q.extent(), pages.region.extent(), open_blocks.extent(), open_slot.extent(), plan.extent()],
            ]
            .concat(),
        )?;
        if args.num_seqs == 0 || args.num_tokens == 0 {
            return Ok(());
        }
        let mut params = AttendParams {
            tables: cuda.tables,
            pages: args.pages,
            page_block_stride: args.page_block_stride,
            page_head_stride: args.page_head_stride,
            q: args.q,
            q_token_stride: args.q_token_stride,
            q_head_stride: args.q_head_stride,
            out: args.out,
            out_token_stride: args.out_token_stride,
            out_head_stride: args.out_head_stride,
            open_blocks: args.open_blocks,
            open_slot: args.open_slot,
            block_table: args.block_table,
            block_table_stride: args.block_table_stride,
            query_start: args.query_start,
            seq_lens: args.seq_lens,
            plan: args.plan,
            workspace: args.workspace,
            counters: args.counters,
            num_seqs: args.num_seqs as i32,
            max_tasks: limits.max_tasks() as i32,
            num_kv_heads: limits.num_kv_heads as i32,
            group: group as i32,
            layer: args.layer as i32,
            first_head: args.first_head as i32,
            element: element as i32,
            reserved: 0,
            scale: args.scale,
            reserved2: 0,
        };
        let mut stages = attend.stages;
        // SAFETY: as in kakeya_cuda_plan; this kernel's second parameter is the number of stages, uint32_t.
        unsafe {
            cuda.device.launch(
                &attend.kernel,
                attend.grid,
                args.stream,
                &mut [from_mut(&mut params).cast(), from_mut(&mut stages).cast()],
            )
        }
    })
}

/// Opens pages into dense rows, for prefill that continues a sequence, and for debugging.
///
/// Errors: BAD_STRUCT_SIZE, BAD_DTYPE, OUT_OF_RANGE (layer, heads, count, strides), ALIASED, CUDA.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_cuda_open(
    cuda: *const kakeya_cuda,
    args: *const kakeya_cuda_open_args,
) -> kakeya_status {
    boundary(|| {
        let args = arguments(args)?;
        // SAFETY: the header asks for a value that is not released during the call.
        let cuda = unsafe { handle(cuda) }?;
        let heads = cuda.limits.num_kv_heads;
        let (dtype, element) = cuda.check_common(args.layer, args.first_head, args.dtype)?;
        within("count", args.count.into(), 0, cuda.shape.max_blocks() as u64)?;
        let shape = [args.count as usize * KAKEYA_BLOCK_TOKENS as usize, heads as usize, cuda.shape.head_dim];
        let k = Tensor::output("k", dtype, args.k, shape, [args.k_token_stride, args.k_head_stride])?;
        let v = Tensor::output("v", dtype, args.v, shape, [args.v_token_stride, args.v_head_stride])?;
        aligned("k", args.k, &[args.k_token_stride * 2, args.k_head_stride * 2])?;
        aligned("v", args.v, &[args.v_token_stride * 2, args.v_head_stride * 2])?;
        let pages =
            cuda.pages(args.pages, args.num_blocks, [args.page_block_stride, args.page_head_stride])?;
        let blocks = Region::new("blocks", args.blocks, args.count as usize)?;
        disjoint(&[k.extent(), v.extent()], &[pages.region.extent(), blocks.extent()])?;
        let mut params = OpenParams {
            tables: cuda.tables,
            pages: args.pages,
            page_block_stride: args.page_block_stride,
            page_head_stride: args.page_head_stride,
            blocks: args.blocks,
            k: args.k,
            v: args.v,
            k_token_stride: args.k_token_stride,
            k_head_stride: args.k_head_stride,
            v_token_stride: args.v_token_stride,
            v_head_stride: args.v_head_stride,
            num_blocks: args.count as i32,
            layer: args.layer as i32,
            first_head: args.first_head as i32,
            num_kv_heads: heads as i32,
            element: element as i32,
            reserved: 0,
        };
        // SAFETY: as in kakeya_cuda_plan.
        unsafe {
            cuda.device.launch(
                &cuda.kernels.open[element],
                [args.count, heads, 2],
                args.stream,
                &mut [from_mut(&mut params).cast()],
            )
        }
    })
}

/// Borrows the handle of a call.
///
/// # Safety
/// `cuda` is NULL or came from kakeya_cuda_new and is not released during the call.
unsafe fn handle<'a>(cuda: *const kakeya_cuda) -> Outcome<&'a kakeya_cuda> {
    pointer("cuda", cuda)?;
    // SAFETY: not NULL, aligned; alive by the promise above, and no call ever writes it.
    Ok(unsafe { &*cuda })
}

/// Refuses what 16-byte accesses and bulk copies of the kernels cannot reach. `strides` in bytes.
fn aligned(name: &str, ptr: *const c_void, strides: &[i64]) -> Outcome {
    if !ptr.addr().is_multiple_of(16) {
        return refuse!(KAKEYA_ERR_MISALIGNED, "{name} is at {ptr:p}; valid on CUDA: a multiple of 16");
    }
    match strides.iter().find(|stride| *stride % 16 != 0) {
        Some(stride) => refuse!(
            KAKEYA_ERR_MISALIGNED,
            "a stride of {name} is {stride} bytes; valid on CUDA: multiples of 16"
        ),
        None => Ok(()),
    }
}

/// query_start, seq_lens and block_table of a step.
struct Sequences {
    query_start: Region<i32>,
    seq_lens: Region<i32>,
    block_table: Region<i32>,
}

impl Sequences {
    fn new(
        num_seqs: u32,
        query_start: *const i32,
        seq_lens: *const i32,
        block_table: *const i32,
        [columns, stride]: [i64; 2],
    ) -> Outcome<Self> {
        let seqs = num_seqs as usize;
        Ok(Self {
            query_start: Region::new("query_start", query_start, seqs + 1)?,
            seq_lens: Region::new("seq_lens", seq_lens, seqs)?,
            block_table: table(block_table, seqs, columns as usize, stride)?.0,
        })
    }

    fn extents(&self) -> [crate::checks::Extent; 3] {
        [self.query_start.extent(), self.seq_lens.extent(), self.block_table.extent()]
    }
}

impl kakeya_cuda {
    /// What append and seal both ask of their arguments; the index of the element type.
    fn check_write(&self, args: &kakeya_cuda_write_args) -> Outcome<usize> {
        let (dtype, element) = self.check_common(args.layer, args.first_head, args.dtype)?;
        within("num_tokens", args.num_tokens.into(), 0, self.limits.max_tokens.into())?;
        within("num_seqs", args.num_seqs.into(), 0, self.limits.max_seqs.into())?;
        let shape = [args.num_tokens as usize, self.limits.num_kv_heads as usize, self.shape.head_dim];
        let k = Tensor::input("k", dtype, args.k, shape, [args.k_token_stride, args.k_head_stride])?;
        let v = Tensor::input("v", dtype, args.v, shape, [args.v_token_stride, args.v_head_stride])?;
        aligned("k", args.k, &[args.k_token_stride * 2, args.k_head_stride * 2])?;
        aligned("v", args.v, &[args.v_token_stride * 2, args.v_head_stride * 2])?;
        let slot_mapping = Region::new("slot_mapping", args.slot_mapping, args.num_tokens as usize)?;
        let open_slot = OpenSlots::new(args.open_slot, args.num_open, args.num_blocks as usize)?;
        let open_blocks = self.open_blocks(dtype, args.open_blocks, args.num_open)?;
        let plan = Region::new("plan", args.plan, self.limits.plan_len() as usize)?;
        let pages =
            self.pages(args.pages, args.num_blocks, [args.page_block_stride, args.page_head_stride])?;
        let status = Region::new("status", args.status, 1)?;
        disjoint(
            &[open_blocks.extent(), pages.region.extent(), status.extent()],
            &[k.extent(), v.extent(), slot_mapping.extent(), open_slot.extent(), plan.extent()],
        )?;
        Ok(element)
    }

    fn check_common(&self, layer: u32, first_head: u32, dtype: u32) -> Outcome<(kakeya_dtype, usize)> {
        check_layer(&self.shape, layer)?;
        check_heads(&self.shape, first_head, "num_kv_heads", self.limits.num_kv_heads)?;
        match kakeya_dtype::from_number(dtype)? {
            dtype @ kakeya_dtype::KAKEYA_DTYPE_BF16 => Ok((dtype, 0)),
            dtype @ kakeya_dtype::KAKEYA_DTYPE_F16 => Ok((dtype, 1)),
            kakeya_dtype::KAKEYA_DTYPE_F32 => {
                refuse!(KAKEYA_ERR_BAD_DTYPE, "dtype is 2 (f32); valid on CUDA: 0 (bf16), 1 (f16)")
            }
        }
    }

    fn pages(&self, ptr: *const u8, num_blocks: u32, strides: [i64; 2]) -> Outcome<Pages> {
        let pages = Pages::new(
            ptr,
            [num_blocks as usize, self.limits.num_kv_heads as usize, self.page_bytes],
            strides,
        )?;
        aligned("pages", ptr.cast(), &strides)?;
        Ok(pages)
    }

    fn open_blocks(&self, dtype: kakeya_dtype, ptr: *const c_void, num_open: u32) -> Outcome<OpenBlocks> {
        let heads = self.limits.num_kv_heads as usize;
        let open_blocks = OpenBlocks::new(self.shape.head_dim, dtype, ptr, num_open, heads)?;
        aligned("open_blocks", ptr, &[])?;
        Ok(open_blocks)
    }
}
