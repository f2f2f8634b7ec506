//! Parameters, grids and sizes of the kernels: what `kernels/*.cu` say, in Rust.

use std::ffi::c_void;
use std::mem::size_of;

use ::kakeya_codec::Codec;
use ::kakeya_codec::recipe::Quantizer;
use ::kakeya_codec::unit::unit_bytes;

use crate::driver::{Device, Kernel};
use crate::error::{Outcome, refuse};
use crate::status::kakeya_status::*;
use crate::version::KAKEYA_BLOCK_TOKENS;

/// `kakeya::PlanParams` of `kernels/params.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct PlanParams {
    pub query_start: *const i32,
    pub seq_lens: *const i32,
    pub block_table: *const i32,
    pub open_slot: *const i32,
    pub block_table_stride: i64,
    pub plan: *mut i32,
    pub num_seqs: i32,
    pub max_seqs: i32,
    pub max_tasks: i32,
    pub max_query: i32,
}

/// `kakeya::AppendParams`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct AppendParams {
    pub k: *const c_void,
    pub v: *const c_void,
    pub k_token_stride: i64,
    pub k_head_stride: i64,
    pub v_token_stride: i64,
    pub v_head_stride: i64,
    pub slot_mapping: *const i64,
    pub open_slot: *const i32,
    pub open_blocks: *mut c_void,
    pub num_tokens: i32,
    pub num_kv_heads: i32,
    pub head_dim: i32,
    pub reserved: i32,
}

/// `kakeya::SealParams`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct SealParams {
    pub tables: u64,
    pub k: *const c_void,
    pub v: *const c_void,
    pub k_token_stride: i64,
    pub k_head_stride: i64,
    pub v_token_stride: i64,
    pub v_head_stride: i64,
    pub open_blocks: *const c_void,
    pub plan: *const i32,
    pub pages: *mut u8,
    pub page_block_stride: i64,
    pub page_head_stride: i64,
    pub status: *mut u32,
    pub layer: i32,
    pub first_head: i32,
    pub num_kv_heads: i32,
    pub element: i32,
}

/// `kakeya::OpenParams`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct OpenParams {
    pub tables: u64,
    pub pages: *const u8,
    pub page_block_stride: i64,
    pub page_head_stride: i64,
    pub blocks: *const i32,
    pub k: *mut c_void,
    pub v: *mut c_void,
    pub k_token_stride: i64,
    pub k_head_stride: i64,
    pub v_token_stride: i64,
    pub v_head_stride: i64,
    pub num_blocks: i32,
    pub layer: i32,
    pub first_head: i32,
    pub num_kv_heads: i32,
    pub element: i32,
    pub reserved: i32,
}

/// `kakeya::AttendParams`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct AttendParams {
    pub tables: u64,
    pub pages: *const u8,
    pub page_block_stride: i64,
    pub page_head_stride: i64,
    pub q: *const c_void,
    pub q_token_stride: i64,
    pub q_head_stride: i64,
    pub out: *mut c_void,
    pub out_token_stride: i64,
    pub out_head_stride: i64,
    pub open_blocks: *const c_void,
    pub open_slot: *const i32,
    pub block_table: *const i32,
    pub block_table_stride: i64,
    pub query_start: *const i32,
    pub seq_lens: *const i32,
    pub plan: *const i32,
    pub workspace: *mut f32,
    pub counters: *mut i32,
    pub num_seqs: i32,
    pub max_tasks: i32,
    pub num_kv_heads: i32,
    pub group: i32,
    pub layer: i32,
    pub first_head: i32,
    pub element: i32,
    pub batch_invariant: i32,
    pub scale: f32,
    pub soft_cap: f32,
    pub sinks: *const f32,
}

/// The head dimensions for which there are kernels.
const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];

/// `kakeya_info` of `kernels/info.cu`: sizes that both sides must agree on, then shared memory by head dimension.
const INFO: &str = "kakeya_info";
const SIZES: usize = 6;

/// One entry of `kakeya_attend_info` (`kernels/attend.cu`): what a launch of the attention kernel for so many query
/// rows a pass needs.
struct AttendInfo {
    head_dim: u32,
    quantizer: u32,
    rows: u32,
    threads: u32,
    fixed_shared: u32,
    blocks_per_sm: u32,
    min_stages: u32,
}

/// Deeper rings of pages in flight are of no use.
const MAX_STAGES: u32 = 8;

impl AttendInfo {
    const NAME: &str = "kakeya_attend_info";

    fn all(device: &Device) -> Outcome<Vec<Self>> {
        let words = device.global(Self::NAME)?;
        let entries = words.chunks_exact(7).map(|x| Self {
            head_dim: x[0],
            quantizer: x[1],
            rows: x[2],
            threads: x[3],
            fixed_shared: x[4],
            blocks_per_sm: x[5],
            min_stages: x[6],
        });
        Ok(entries.collect())
    }
}

/// What a step may hold at most; see kakeya_cuda_limits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub max_seqs: u32,
    pub max_tokens: u32,
    pub max_query: u32,
    pub num_kv_heads: u32,
    pub batch_invariant: bool,
}

impl Limits {
    /// Blocks that `seqs` sequences can fill with `tokens` tokens: one that was begun before, then whole ones.
    pub fn tasks(seqs: u32, tokens: u32) -> u32 {
        tokens.min(seqs.saturating_add(tokens / KAKEYA_BLOCK_TOKENS))
    }

    pub fn max_tasks(&self) -> u32 {
        Self::tasks(self.max_seqs, self.max_tokens)
    }

    /// int32 of a plan: `kakeya::plan_size`.
    pub fn plan_len(&self) -> u64 {
        4 + 4 * u64::from(self.max_tasks()) + u64::from(self.max_seqs) + 1
    }
}

/// An attention kernel, and how it is launched.
pub(crate) struct AttendKernel {
    pub kernel: Kernel,
    pub grid: [u32; 3],
    /// Its parameters behind the first: stages, then, with a soft cap, the rows that a partial result has room for.
    pub more: Vec<u32>,
}

/// The attention kernels of one model.
pub(crate) struct Attend {
    pub plain: AttendKernel,
    /// For scores with a soft cap; that it cannot be had concerns only who asks for one.
    capped: Outcome<AttendKernel>,
    /// Query rows a pass of the plain kernel, for which partial results have room.
    rows: u32,
}

/// The kernels of one model on one device.
pub(crate) struct Kernels {
    pub plan: Kernel,
    /// For bf16 and f16.
    pub append: [Kernel; 2],
    pub seal: [Kernel; 2],
    pub open: [Kernel; 2],
    pub attend: Attend,
    multiprocessors: u32,
    /// Blocks of kakeya_seal that run at once.
    seal_blocks: u32,
}

impl Kernels {
    pub fn new(device: &Device, codec: &Codec, limits: &Limits) -> Outcome<Self> {
        let head_dim = codec.shape().head_dim;
        let Some(column) = HEAD_DIMS.iter().position(|&d| d == head_dim) else {
            return refuse!(
                KAKEYA_ERR_UNSUPPORTED,
                "head_dim is {head_dim}; there are kernels for {HEAD_DIMS:?}"
            );
        };
        let info = device.global(INFO)?;
        if info.len() != SIZES + 2 * HEAD_DIMS.len() {
            return refuse!(
                KAKEYA_ERR_NO_KERNELS,
                "{INFO} has {} values: kernels of another version",
                info.len()
            );
        }
        let ours = [
            size_of::<PlanParams>(),
            size_of::<AppendParams>(),
            size_of::<SealParams>(),
            size_of::<OpenParams>(),
            size_of::<AttendParams>(),
            size_of::<::kakeya_codec::device::Header>(),
        ];
        for (theirs, ours) in info.iter().zip(ours) {
            if *theirs as usize != ours {
                return refuse!(
                    KAKEYA_ERR_NO_KERNELS,
                    "the embedded kernels are of another version (sizes {:?}; valid: {ours:?})",
                    &info[..SIZES]
                );
            }
        }
        let pair = |name: &str, shared| -> Outcome<[Kernel; 2]> {
            Ok([
                device.kernel(&format!("{name}_bf16"), shared)?,
                device.kernel(&format!("{name}_f16"), shared)?,
            ])
        };
        let (seal_shared, open_shared) = info[SIZES..].split_at(HEAD_DIMS.len());
        let seal = pair("kakeya_seal", seal_shared[column] as usize)?;
        Ok(Self {
            plan: device.kernel("kakeya_plan", 0)?,
            append: pair("kakeya_append", 0)?,
            seal,
            open: pair("kakeya_open", open_shared[column] as usize)?,
            attend: Attend::new(device, codec, limits)?,
            multiprocessors: device.multiprocessors,
            seal_blocks: device.multiprocessors * device.occupancy(&seal[0])?,
        })
    }

    /// Grid of kakeya_append: eight elements a thread and turn, and no more blocks than run at once.
    pub fn append_grid(&self, num_tokens: u32, num_kv_heads: u32, head_dim: usize) -> [u32; 3] {
        let chunks = u64::from(num_tokens) * 2 * u64::from(num_kv_heads) * (head_dim as u64 / 8);
        let blocks = chunks.div_ceil(u64::from(self.append[0].threads));
        [blocks.min(u64::from(self.multiprocessors) * 8) as u32, 1, 1]
    }

    /// Grid of kakeya_seal: two blocks for each (block, KV head) that may be full, and no more than run at once.
    pub fn seal_grid(&self, num_seqs: u32, num_tokens: u32, num_kv_heads: u32) -> [u32; 3] {
        let pairs = u64::from(Limits::tasks(num_seqs, num_tokens)) * u64::from(num_kv_heads);
        [2 * pairs.min(u64::from(self.seal_blocks / 2).max(1)) as u32, 1, 1]
    }
}

/// The attention kernel keeps offsets of a page in 16 bits.
const MAX_PAGE_BYTES: usize = 1 << 16;

/// The attention kernel reads one pair of tiles ahead, also behind keys' last codes: that must lie in the page still. It does
/// wherever values have a tenth of the bits.
fn check_read_ahead(codec: &Codec) -> Outcome {
    let shape = codec.shape();
    for layer in 0..shape.num_layers {
        let layout = codec.page_layout(layer)?;
        let pair = 32 / layout.unit.tokens;
        for head in 0..shape.num_kv_heads {
            let bits: usize = codec.tables(layer, head)?.k.widths.iter().map(|&w| usize::from(w)).sum();
            let group = unit_bytes(bits);
            if layout.codes_offset + (layout.unit.groups() + pair) * group > layout.page_bytes {
                return refuse!(
                    KAKEYA_ERR_UNSUPPORTED,
                    "layer {layer}, head {head}: keys take {bits} of {} bits a group; the attention kernel wants some of them for values",
                    layout.code_bits
                );
            }
        }
    }
    Ok(())
}

impl Attend {
    fn new(device: &Device, codec: &Codec, limits: &Limits) -> Outcome<Self> {
        let shape = codec.shape();
        let group = (shape.num_q_heads / shape.num_kv_heads) as u32;
        let needed = group * limits.max_query;
        let mut kinds = AttendInfo::all(device)?;
        // As kernels/attend_shape.cuh numbers them.
        let (number, quantizer) = match codec.recipe().quantizer {
            Quantizer::Uniform => (0, "uniform"),
            Quantizer::LloydMax => (1, "cubic"),
            Quantizer::Trellis => (2, "trellis"),
        };
        kinds.retain(|kind| kind.head_dim as usize == shape.head_dim && kind.quantizer == number);
        kinds.sort_by_key(|kind| kind.rows);
        // The kernels for different numbers of rows add up in different orders: one for all of them.
        let fits = |kind: &AttendInfo| kind.rows >= needed && !limits.batch_invariant;
        let Some(most) = kinds.last() else {
            return refuse!(KAKEYA_ERR_NO_KERNELS, "no attention kernel for head_dim {}", shape.head_dim);
        };
        let wanted = kinds.iter().position(fits).unwrap_or(kinds.len() - 1);
        check_read_ahead(codec)?;
        if codec.page_bytes() > MAX_PAGE_BYTES {
            return refuse!(
                KAKEYA_ERR_UNSUPPORTED,
                "pages of {} bytes; the attention kernel takes at most {MAX_PAGE_BYTES}",
                codec.page_bytes()
            );
        }
        let name = |rows| format!("kakeya_attend_d{}_{quantizer}_r{rows}", shape.head_dim);
        let bytes = codec.page_bytes();
        // Large pages may leave no shared memory for so many rows: then fewer, in more passes.
        let attempt = |kind: &AttendInfo| {
            AttendKernel::new(device, &name(kind.rows), kind, needed, bytes).map(|kernel| (kernel, kind.rows))
        };
        let first = attempt(&kinds[wanted]);
        let (plain, rows) =
            kinds[..wanted].iter().rev().fold(first, |found, kind| found.or_else(|_| attempt(kind)))?;
        // There are two, for the smallest and for the largest number of rows. Where the plain kernel was made for fewer than
        // the second, one pass holds all rows that there are: the passes are as many, and partial results need room for no
        // more rows than the plain kernel's. Where the plain kernel has fewer for want of shared memory, the second does not
        // fit either, but the first may.
        let least = &kinds[0];
        let kind = if rows == least.rows { least } else { most };
        let mut capped =
            AttendKernel::new(device, &format!("{}_capped", name(kind.rows)), kind, needed, bytes);
        if let Ok(capped) = &mut capped {
            capped.grid[0] = capped.grid[0].min(plain.grid[0]);
            capped.more.push(rows);
        }
        Ok(Self { plain, capped, rows })
    }

    /// The kernel for a soft cap of scores, 0: none.
    pub fn for_soft_cap(&self, soft_cap: f32) -> Outcome<&AttendKernel> {
        if soft_cap == 0.0 {
            return Ok(&self.plain);
        }
        match &self.capped {
            Ok(capped) => Ok(capped),
            Err(failure) => {
                refuse!(failure.status, "soft_cap is {soft_cap}; valid: 0, as {}", failure.message)
            }
        }
    }

    /// float32 of the workspace: a record for each block and each (sequence, KV head), a pass. With a soft cap no more.
    pub fn workspace_len(&self, limits: &Limits, head_dim: usize) -> u64 {
        let [blocks, passes, _] = self.plain.grid.map(u64::from);
        let records = blocks + u64::from(limits.max_seqs) * u64::from(limits.num_kv_heads);
        passes * records * u64::from(self.rows) * (head_dim as u64 + 2)
    }

    /// Arrival counters, int32.
    pub fn counters_len(&self, limits: &Limits) -> u64 {
        u64::from(self.plain.grid[1]) * u64::from(limits.max_seqs) * u64::from(limits.num_kv_heads)
    }
}

impl AttendKernel {
    /// The kernel `name` of a kind, for `needed` query rows of a sequence and pages of `stage_bytes`.
    fn new(device: &Device, name: &str, kind: &AttendInfo, needed: u32, stage_bytes: usize) -> Outcome<Self> {
        // As many blocks as the kernel was compiled for, else fewer; then as many stages as fit.
        let mut refusal = None;
        for blocks in (1..=kind.blocks_per_sm).rev() {
            for stages in (kind.min_stages..=MAX_STAGES).rev() {
                let bytes = kind.fixed_shared as usize + stages as usize * stage_bytes;
                match device.kernel(name, bytes) {
                    Ok(kernel) if kernel.threads != kind.threads => {
                        return refuse!(KAKEYA_ERR_NO_KERNELS, "{name}: {} threads", kernel.threads);
                    }
                    Ok(kernel) if device.occupancy(&kernel)? >= blocks => {
                        let grid = [device.multiprocessors * blocks, needed.div_ceil(kind.rows), 1];
                        return Ok(Self { kernel, grid, more: vec![stages] });
                    }
                    Ok(_) => {}
                    Err(failure) => refusal = Some(failure),
                }
            }
        }
        match refusal {
            Some(failure) => Err(failure),
            None => refuse!(KAKEYA_ERR_UNSUPPORTED, "{name} does not fit on this GPU"),
        }
    }
}
