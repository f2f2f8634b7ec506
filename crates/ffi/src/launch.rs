//! Launches of kernels: what each entry point of `cuda.rs` checks in its arguments, and the frame that they share.

use std::ffi::c_void;
use std::ptr::{from_mut, null};

use crate::attend::{check_soft_cap, kakeya_attend_options};
use crate::checks::{Extent, Region, Sized32, arguments, disjoint, pointer, within};
use crate::codec::{check_heads, check_layer};
use crate::cuda::{
    kakeya_cuda, kakeya_cuda_attend_args, kakeya_cuda_open_args, kakeya_cuda_plan_args,
    kakeya_cuda_write_args,
};
use crate::driver::Kernel;
use crate::dtype::kakeya_dtype;
use crate::error::{Outcome, refuse};
use crate::kernels::{AppendParams, AttendKernel, AttendParams, OpenParams, PlanParams, SealParams};
use crate::panic::boundary;
use crate::status::kakeya_status::{self, *};
use crate::tensor::{OpenBlocks, OpenSlots, Pages, Tensor, table};
use crate::version::KAKEYA_BLOCK_TOKENS;

/// A kernel with the parameters that it takes, checked. A grid with a 0 in it does nothing.
pub(crate) struct Launch<'a, P> {
    kernel: &'a Kernel,
    grid: [u32; 3],
    stream: *mut c_void,
    params: P,
    /// Every array that was passed, for the question whose memory it is.
    memory: Vec<Extent>,
    /// The attention kernels' parameters behind the first.
    more: Vec<u32>,
    /// Whether it may begin before the launch before it has ended: the kernels that wait by themselves.
    early: bool,
}

/// An entry point that launches a kernel: `prepare` checks the arguments.
///
/// # Safety
/// `cuda` is NULL or came from kakeya_cuda_new and is not released during the call; `args` is NULL or points to
/// arguments, whose memory on the device is there until the kernel has run.
pub(crate) unsafe fn launch<A: Sized32, P>(
    cuda: *const kakeya_cuda,
    args: *const A,
    prepare: impl for<'a> FnOnce(&'a kakeya_cuda, &A) -> Outcome<Launch<'a, P>>,
) -> kakeya_status {
    boundary(|| {
        let args = arguments(args)?;
        // SAFETY: promised by the caller.
        let cuda = unsafe { handle(cuda) }?;
        let Launch { kernel, grid, stream, mut params, memory, mut more, early } = prepare(cuda, &args)?;
        cuda.device.check_memory(&memory)?;
        let mut pointers: Vec<*mut c_void> = vec![from_mut(&mut params).cast()];
        pointers.extend(more.iter_mut().map(|word| from_mut(word).cast::<c_void>()));
        // SAFETY: `params` is the struct of this kernel (kernels.rs), and `more` are its other parameters; the caller
        // promised the memory.
        unsafe { cuda.device.launch(kernel, grid, stream, early, &mut pointers) }
    })
}

/// Borrows the handle of a call.
///
/// # Safety
/// `cuda` is NULL or came from kakeya_cuda_new and is not released during the call.
pub(crate) unsafe fn handle<'a>(cuda: *const kakeya_cuda) -> Outcome<&'a kakeya_cuda> {
    pointer("cuda", cuda)?;
    // SAFETY: not NULL, aligned; alive by the promise above, and no call ever writes it.
    Ok(unsafe { &*cuda })
}

impl kakeya_cuda {
    /// Which blocks a step fills, and how attention is divided.
    pub(crate) fn plan(&self, args: &kakeya_cuda_plan_args) -> Outcome<Launch<'_, PlanParams>> {
        let limits = &self.limits;
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
        let memory = apart(&[plan.extent()], &[&inputs.extents()[..], &[open_slot.extent()]].concat())?;
        let params = PlanParams {
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
        Ok(Launch {
            kernel: &self.kernels.plan,
            grid: [1, 1, 1],
            stream: args.stream,
            params,
            memory,
            more: Vec::new(),
            early: false,
        })
    }

    /// A step's K and V into open blocks.
    pub(crate) fn append(&self, args: &kakeya_cuda_write_args) -> Outcome<Launch<'_, AppendParams>> {
        let (element, memory) = self.check_write(args)?;
        let heads = self.limits.num_kv_heads;
        let params = AppendParams {
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
            head_dim: self.shape.head_dim as i32,
            reserved: 0,
        };
        let grid = self.kernels.append_grid(args.num_tokens, heads, self.shape.head_dim);
        Ok(Launch {
            kernel: &self.kernels.append[element],
            grid,
            stream: args.stream,
            params,
            memory,
            more: Vec::new(),
            early: false,
        })
    }

    /// The blocks that a step fills, into pages.
    pub(crate) fn seal(&self, args: &kakeya_cuda_write_args) -> Outcome<Launch<'_, SealParams>> {
        let (element, memory) = self.check_write(args)?;
        let heads = self.limits.num_kv_heads;
        let params = SealParams {
            tables: self.tables,
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
        let grid = self.kernels.seal_grid(args.num_seqs, args.num_tokens, heads);
        Ok(Launch {
            kernel: &self.kernels.seal[element],
            grid,
            stream: args.stream,
            params,
            memory,
            more: Vec::new(),
            early: true,
        })
    }

    /// Attention of sequences with few tokens.
    pub(crate) fn attend(
        &self,
        args: &kakeya_cuda_attend_args,
        options: Option<kakeya_attend_options>,
    ) -> Outcome<Launch<'_, AttendParams>> {
        let (limits, attend) = (&self.limits, &self.kernels.attend);
        let (dtype, element) = self.check_common(args.layer, args.first_head, args.dtype)?;
        within("num_seqs", args.num_seqs.into(), 0, limits.max_seqs.into())?;
        within("num_tokens", args.num_tokens.into(), 0, limits.max_tokens.into())?;
        if !args.scale.is_finite() {
            return refuse!(KAKEYA_ERR_OUT_OF_RANGE, "scale is {}; valid: a finite number", args.scale);
        }
        let soft_cap = options.map_or(0.0, |options| options.soft_cap);
        let chosen = self.attention_for(soft_cap)?;
        let group = self.shape.num_q_heads / self.shape.num_kv_heads;
        let q_heads = limits.num_kv_heads as usize * group;
        let sinks_ptr = options.map_or(null(), |options| options.sinks);
        let sinks = Region::new("sinks", sinks_ptr, if sinks_ptr.is_null() { 0 } else { q_heads })?;
        let shape = [args.num_tokens as usize, q_heads, self.shape.head_dim];
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
            self.pages(args.pages, args.num_blocks, [args.page_block_stride, args.page_head_stride])?;
        let open_blocks = self.open_blocks(dtype, args.open_blocks, args.num_open)?;
        let open_slot = OpenSlots::new(args.open_slot, args.num_open, args.num_blocks as usize)?;
        let plan = Region::new("plan", args.plan, limits.plan_len() as usize)?;
        let workspace = Region::new(
            "workspace",
            args.workspace,
            attend.workspace_len(limits, self.shape.head_dim) as usize,
        )?;
        let counters = Region::new("counters", args.counters, attend.counters_len(limits) as usize)?;
        let memory = apart(
            &[out.extent(), workspace.extent(), counters.extent()],
            &[
                &sequences.extents()[..],
                &[q.extent(), pages.region.extent(), open_blocks.extent(), open_slot.extent(), plan.extent()],
                &[sinks.extent()],
            ]
            .concat(),
        )?;
        let grid = if args.num_seqs == 0 || args.num_tokens == 0 { [0; 3] } else { chosen.grid };
        let params = AttendParams {
            tables: self.tables,
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
            batch_invariant: limits.batch_invariant.into(),
            scale: args.scale,
            // Below the one bound nothing is left of scores, above the other nothing bent; between them the arithmetic of the
            // kernels stays in f32's range. Those without a cap do not look at it.
            soft_cap: soft_cap.clamp(1e-20, 1e20),
            sinks: sinks_ptr,
        };
        Ok(Launch {
            kernel: &chosen.kernel,
            grid,
            stream: args.stream,
            params,
            memory,
            more: chosen.more.clone(),
            early: true,
        })
    }

    /// The kernel for a soft cap of scores, 0: none.
    pub(crate) fn attention_for(&self, soft_cap: f32) -> Outcome<&AttendKernel> {
        check_soft_cap(soft_cap)?;
        self.kernels.attend.for_soft_cap(soft_cap)
    }

    /// Pages into dense rows.
    pub(crate) fn open(&self, args: &kakeya_cuda_open_args) -> Outcome<Launch<'_, OpenParams>> {
        let heads = self.limits.num_kv_heads;
        let (dtype, element) = self.check_common(args.layer, args.first_head, args.dtype)?;
        within("count", args.count.into(), 0, self.shape.max_blocks() as u64)?;
        let shape = [args.count as usize * KAKEYA_BLOCK_TOKENS as usize, heads as usize, self.shape.head_dim];
        let k = Tensor::output("k", dtype, args.k, shape, [args.k_token_stride, args.k_head_stride])?;
        let v = Tensor::output("v", dtype, args.v, shape, [args.v_token_stride, args.v_head_stride])?;
        aligned("k", args.k, &[args.k_token_stride * 2, args.k_head_stride * 2])?;
        aligned("v", args.v, &[args.v_token_stride * 2, args.v_head_stride * 2])?;
        let pages =
            self.pages(args.pages, args.num_blocks, [args.page_block_stride, args.page_head_stride])?;
        let blocks = Region::new("blocks", args.blocks, args.count as usize)?;
        let memory = apart(&[k.extent(), v.extent()], &[pages.region.extent(), blocks.extent()])?;
        let params = OpenParams {
            tables: self.tables,
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
        Ok(Launch {
            kernel: &self.kernels.open[element],
            grid: [args.count, heads, 2],
            stream: args.stream,
            params,
            memory,
            more: Vec::new(),
            early: false,
        })
    }

    /// What append and seal both ask of their arguments; the index of the element type, and the arrays.
    fn check_write(&self, args: &kakeya_cuda_write_args) -> Outcome<(usize, Vec<Extent>)> {
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
        let memory = apart(
            &[open_blocks.extent(), pages.region.extent(), status.extent()],
            &[k.extent(), v.extent(), slot_mapping.extent(), open_slot.extent(), plan.extent()],
        )?;
        Ok((element, memory))
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

/// As [`disjoint`]; all arrays together.
fn apart(outputs: &[Extent], inputs: &[Extent]) -> Outcome<Vec<Extent>> {
    disjoint(outputs, inputs)?;
    Ok([outputs, inputs].concat())
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

    fn extents(&self) -> [Extent; 3] {
        [self.query_start.extent(), self.seq_lens.extent(), self.block_table.extent()]
    }
}
